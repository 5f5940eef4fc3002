"""The screens of experiments.py about the gate, the noise floor and a bisection."""

from __future__ import annotations

from collections.abc import Iterator

from rich.console import Group, RenderableType
from rich.text import Text

from utils.experiments.bisect import Bisection
from utils.experiments.gate import GateAnswer
from utils.experiments.noise import PAIRED, Noise
from utils.terminal.tables import plain_table, title
from utils.terminal.words import counted, duration, fact_lines, loss_text, setting_text, time_text

VERDICT_STYLES = {"keep": "green", "discard": "red", "unsure": "yellow"}
MANY = 20  # comparisons: from then on a verdict by chance is likely among them


def gate_screen(answer: GateAnswer) -> Iterator[RenderableType]:
    """The pairs, the verdict, and the evidence for it."""
    if answer.pairs:
        table = plain_table(right=["seed", answer.candidate, answer.baseline, "improvement"])
        better = -1 if _lower_is_better(answer) else 1
        for pair in answer.pairs:
            values = (pair.candidate_value, pair.baseline_value)
            difference = better * (values[0] - values[1])
            table.add_row(str(pair.seed), *map(loss_text, values), f"{difference:+.4f}")
        yield Group(title(answer.metric), table, "")
    yield Text.assemble((answer.verdict, f"bold {VERDICT_STYLES[answer.verdict]}"), f": {answer.reason}")
    rows = []
    if answer.effect is not None:
        rows.append(("improvement", f"{answer.effect:+.4f}" + _interval_words(answer)))
    if answer.min_effect:
        rows.append(("wanted", f"more than {answer.min_effect:g}"))
    rows.append(("cost", f"{counted(answer.trained, 'run')} trained in {duration(answer.seconds)}"))
    if answer.before:
        rows.append(("ledger", f"this was compared before, at {time_text(answer.before)}; it is not tried again"))
    if answer.compared >= MANY:
        words = f"{answer.compared:,} comparisons: without any effect, one in twenty gets a verdict by chance"
        rows.append(("ledger", words))
    yield fact_lines(rows)


def _interval_words(answer: GateAnswer) -> str:
    if answer.interval is None:
        return ""
    low, high = answer.interval
    return f", {low:+.4f} to {high:+.4f} with 95%"


def _lower_is_better(answer: GateAnswer) -> bool:
    """Whether lower values are better, inferred from the signs of the effect and of the differences."""
    total = sum(pair.candidate_value - pair.baseline_value for pair in answer.pairs)
    return (answer.effect or 0.0) * total <= 0


def noise_screen(noise: Noise) -> Iterator[RenderableType]:
    """The noise floor, and how many seeds an effect needs."""
    low, high = noise.interval
    yield title(f"{noise.metric} of {noise.name} with {len(noise.values)} seeds")
    yield fact_lines(
        [
            ("mean", loss_text(noise.mean)),
            ("deviation", f"{noise.deviation:.4g} from seed to seed, {low:.4g} to {high:.4g} with 95%"),
            ("cost", f"{counted(noise.trained, 'run')} trained in {duration(noise.seconds)}"),
        ]
    )
    if not noise.needed:
        yield Text("the seed makes no difference", style="yellow")
        return
    table = plain_table(right=["effect", f"seeds, correlation {PAIRED:g}", "seeds, independent"])
    for row in noise.needed:
        table.add_row(
            f"{row.effect:.4g}", *("over 1,000" if n is None else f"{n:,}" for n in (row.paired, row.unpaired))
        )
    yield Group("", title("Pairs of seeds that find an effect in 80% of cases"), table)


def bisection_screen(found: Bisection) -> Iterator[RenderableType]:
    """What makes the difference between two experiments."""
    if found.problem:
        yield Text.assemble(("not found", "bold yellow"), f": {found.problem}")
    else:
        parts = [*found.settings, *(["the code"] if found.code else [])]
        verb = "make" if parts[1:] else "makes"
        yield Text.assemble((" and ".join(parts), "bold green"), f" {verb} the difference")
    rows = [(key, f"{setting_text(good)} -> {setting_text(bad)}") for key, (good, bad) in found.settings.items()]
    if found.commit:
        rows.append(("first bad commit", found.commit))
    elif found.code:
        rows.append(("commit", "the good commit is not an ancestor of the bad one, so none can be named"))
    rows += [("not judged", f"it may also be {commit}") for commit in found.doubtful]
    cost = f"{counted(found.trials, 'trial')}, {counted(found.trained, 'run')} trained, {duration(found.seconds)}"
    rows.append(("cost", cost))
    if found.environment:
        rows.append(("not tried", f"the environment differs in: {', '.join(found.environment)}"))
    yield fact_lines(rows)
