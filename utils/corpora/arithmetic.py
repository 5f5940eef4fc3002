"""Arithmetic problems with one right answer: how they are generated, written and held out.

Problems that the commutative law makes equal (3+4*5 and 5*4+3) are forms of one problem. Whether a problem is held out
depends on a hash of its canonical form, so either all its forms are held out or none.
"""

from __future__ import annotations

import hashlib
import itertools
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from utils.config.settings import ArithmeticConfig

EQUALS = "="  # what follows it is the answer
ENUMERATED = 4  # enumerate all forms if they are at most this many times as many as the requested problems
TRIES = 20  # otherwise, the largest number of random draws per requested problem
SEED = "arithmetic"

Term = tuple[str, tuple[int, ...], tuple[str, ...]]  # a summand: its sign, operands and the operators between them


@dataclass(frozen=True)
class Problem:
    """Operands and the operators between them."""

    operands: tuple[int, ...]
    operators: tuple[str, ...]

    @property
    def answer(self) -> int:
        """The value of the expression. Raises ZeroDivisionError if it has none."""
        total = 0
        for sign, factors, operators in self._terms():
            value = factors[0]
            for operator, factor in zip(operators, factors[1:], strict=True):
                value = value * factor if operator == "*" else value // factor if operator == "//" else value % factor
            total += -value if sign == "-" else value
        return total

    @property
    def digits(self) -> int:
        """The number of digits of the longest operand."""
        return max(len(str(abs(operand))) for operand in self.operands)

    @property
    def kind(self) -> str:
        """The distinct operators, followed by the number of operands if there are more than two."""
        operators = " ".join(dict.fromkeys(sorted(self.operators)))
        return operators if len(self.operands) == 2 else f"{operators} ({len(self.operands)} operands)"

    def canonical(self) -> tuple[Term, ...]:
        """The canonical form, which all forms share: sorted summands, each with its leading factors sorted."""
        terms = []
        for sign, factors, operators in self._terms():
            begin = _first_factors(operators)
            terms.append((sign, (*sorted(factors[:begin]), *factors[begin:]), operators))
        return tuple(sorted(terms))

    def forms(self) -> set[Problem]:
        """This problem in all orders of summands, and of their leading factors, that the commutative law allows."""
        found = set()
        for order in itertools.permutations(self._terms()):
            if order[0][0] == "+":
                for terms in itertools.product(*map(_orders, order)):
                    operands = tuple(factor for _, factors, _ in terms for factor in factors)
                    between = [operator for sign, _, operators in terms for operator in (sign, *operators)]
                    found.add(Problem(operands, tuple(between[1:])))
        return found

    def _terms(self) -> list[Term]:
        """The summands."""
        terms: list[Term] = []
        sign, begin = "+", 0
        for end, operator in enumerate((*self.operators, "+"), start=1):
            if operator in ("+", "-"):
                terms.append((sign, self.operands[begin:end], self.operators[begin : end - 1]))
                sign, begin = operator, end
        return terms

    def prompt(self, settings: ArithmeticConfig) -> str:
        """The problem as text, up to the equals sign."""
        width = settings.arithmetic_digits if settings.arithmetic_format != "plain" else 1
        numbers = [_number(operand, width) for operand in self.operands]
        rest = (operator + number for operator, number in zip(self.operators, numbers[1:], strict=True))
        return numbers[0] + "".join(rest) + EQUALS

    def solution(self, settings: ArithmeticConfig) -> str:
        """The answer as text. In the format `reversed`, the last digit follows the sign: the order of carries."""
        width = answer_width(settings) if settings.arithmetic_format != "plain" else 1
        number = _number(abs(self.answer), width)
        return ("-" if self.answer < 0 else "") + (number[::-1] if settings.arithmetic_format == "reversed" else number)


def _orders(term: Term) -> Iterator[Term]:
    """A summand with its leading factors in every order: a*b//c equals b*a//c, but a//b*c has only one order."""
    sign, factors, operators = term
    begin = _first_factors(operators)
    for order in set(itertools.permutations(factors[:begin])):
        yield sign, (*order, *factors[begin:]), operators


def _first_factors(operators: tuple[str, ...]) -> int:
    """The number of leading factors of a summand: those before its first operator other than *."""
    return next((index for index, operator in enumerate(operators) if operator != "*"), len(operators)) + 1


def _number(value: int, width: int) -> str:
    """`value` with at least `width` digits."""
    return ("-" if value < 0 else "") + str(abs(value)).zfill(width)


def answer_width(settings: ArithmeticConfig) -> int:
    """An upper bound on the number of digits of an answer."""
    largest, terms = 10**settings.arithmetic_digits - 1, settings.arithmetic_terms
    return len(str(largest**terms if "*" in settings.arithmetic_operators else largest * terms))


@dataclass(frozen=True)
class ProblemSet:
    """The problems for some settings. train: all forms of each problem, or one. held_out: one form of each problem."""

    train: Sequence[Problem]
    held_out: Sequence[Problem]


def problem_set(settings: ArithmeticConfig) -> ProblemSet:
    """Generate the problems; the same settings give the same problems on every machine."""
    train, held_out, seen = [], [], set()
    for problem in _candidates(settings):
        canonical = problem.canonical()
        if canonical in seen:
            continue
        seen.add(canonical)
        if _share(canonical) < settings.arithmetic_held_out:
            held_out.append(problem)
        else:
            forms = problem.forms() if settings.arithmetic_commute else [problem]
            train += sorted(forms, key=lambda form: (form.operands, form.operators))
        if len(seen) == settings.arithmetic_problems:
            break
    return ProblemSet(train, held_out)


def _share(canonical: tuple[Term, ...]) -> float:
    """A number from 0 to 1 that depends only on the problem, so that other settings hold out the same problems."""
    digest = hashlib.sha256(repr(canonical).encode()).digest()
    return int.from_bytes(digest[:8], "big") / 2**64


def _candidates(settings: ArithmeticConfig) -> Iterator[Problem]:
    """All problems that have an answer, in random order; random draws, which may repeat, if there are too many."""
    randomness, wanted = random.Random(SEED), settings.arithmetic_problems
    largest = 10**settings.arithmetic_digits - 1
    numbers = range(-largest if settings.arithmetic_negatives else 0, largest + 1)
    operators, lengths = settings.arithmetic_operators, range(2, settings.arithmetic_terms + 1)
    count = sum(len(numbers) ** length * len(operators) ** (length - 1) for length in lengths)
    if count <= ENUMERATED * wanted:
        problems = [
            Problem(operands, between)
            for length in lengths
            for between in itertools.product(operators, repeat=length - 1)
            for operands in itertools.product(numbers, repeat=length)
        ]
        keys = [randomness.random() for _ in problems]  # the result of `shuffle` may differ between versions of Python
        order = sorted(range(len(problems)), key=keys.__getitem__)
        yield from (problems[index] for index in order if _has_answer(problems[index]))
        return
    for _ in range(TRIES * wanted):
        length = lengths[int(randomness.random() * len(lengths))]
        operands = tuple(_draw(randomness, settings) for _ in range(length))
        between = tuple(operators[int(randomness.random() * len(operators))] for _ in range(length - 1))
        if _has_answer(problem := Problem(operands, between)):
            yield problem


def _draw(randomness: random.Random, settings: ArithmeticConfig) -> int:
    """Draw an operand; all numbers of digits are equally likely."""
    digits = 1 + int(randomness.random() * settings.arithmetic_digits)
    least = 10 ** (digits - 1) if digits > 1 else 0
    value = least + int(randomness.random() * (10**digits - least))
    return -value if settings.arithmetic_negatives and randomness.random() < 0.5 else value


def _has_answer(problem: Problem) -> bool:
    try:
        problem.answer  # noqa: B018 (computed for its error)
    except ZeroDivisionError:
        return False
    return True
