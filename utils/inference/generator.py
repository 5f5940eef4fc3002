"""Text from a run, for notebooks and scripts: Generator.from_run("baseline").generate("The ")."""

from __future__ import annotations

import functools
import math
import os
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, Self, get_args

from model import LanguageModel
from tokenizer import Tokenizer, TokenizerError
from utils.config.loader import ConfigLoader
from utils.config.settings import InferenceConfig
from utils.errors import UserError
from utils.files import expand_home
from utils.inference.decode import Block, Window, generate_blocks, start_tokens
from utils.inference.export import document_token, load_export
from utils.inference.quantization import WeightsChoice, choose_weights, with_weights
from utils.inference.sampling import SamplingOptions
from utils.inference.scoring import Score, score
from utils.inference.speculative import PROPOSED, Speculators
from utils.inference.static import StaticDecoders, is_static
from utils.inference.stats import GenerationStats
from utils.inference.text_stream import TextStream
from utils.machine.device import choose_device
from utils.runs.find import find_export
from utils.terminal.cli import PROJECT_ROOT

SEED, BATCH_SIZE = 1337, 16
SEEDS = 2**63


@dataclass(frozen=True)
class Completion:
    """The text generated after a prompt.

    text: the new text, without the prompt and the stop string.
    tokens: ids of all generated tokens, including those of a stop string and the end-of-text token.
    logprobs: natural logarithm of the probability that the model gave to each of them, before any filter.
    finish: "stop" at a stop string or the end-of-text token (`Generator.ends`), otherwise "length".
    """

    prompt: str
    text: str
    tokens: list[int]
    logprobs: list[float]
    finish: str
    seed: int


@dataclass(frozen=True)
class Request:
    """How to generate after a prompt. Sequence i of a call draws from the random stream of seed + i.

    Raises:
        UserError: a value is out of bounds.

    >>> request = Request(max_new_tokens=20, options=SamplingOptions(temperature=0.5, top_k=40), stops=["\\n"], seed=1)
    >>> completions = Generator.from_run("baseline").generate_batch(["The ", "A "], request)
    >>> len(completions)
    2
    """

    max_new_tokens: int = 300
    options: SamplingOptions = field(default_factory=SamplingOptions)
    stops: Sequence[str] = ()
    seed: int = SEED
    window: Window = "sliding"

    @classmethod
    def configured(cls, settings: InferenceConfig) -> Self:
        """A request with the settings of section `inference`."""
        return cls(settings.max_new_tokens, SamplingOptions.configured(settings))

    def __post_init__(self) -> None:
        if self.max_new_tokens < 1:
            raise UserError(f"max-new-tokens must be at least 1, not {self.max_new_tokens}")
        if not 0 <= self.seed < SEEDS:
            raise UserError(f"seed must be a whole number from 0 to 2^63 - 1, not {self.seed}")
        if self.window not in get_args(Window):
            raise UserError(f"window must be {' or '.join(get_args(Window))}, not {self.window!r}")
        if isinstance(self.stops, str):
            raise UserError(f"stops must be several texts, not the text {self.stops!r}")


@dataclass
class _Sequence:
    """A sequence that is being generated."""

    prompt: str
    seed: int
    stream: TextStream
    ends: frozenset[int]
    has_ended: bool = False
    text: str = ""
    tokens: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)

    def extend(self, tokens: list[int], logprobs: list[float]) -> tuple[str, int]:
        """Append tokens, up to a stop string or a token that ends the text.

        Returns:
            The text that no later token can change, and the number of tokens appended.
        """
        if self.has_ended:
            return "", 0
        end = next((place for place, token in enumerate(tokens) if token in self.ends), None)
        new, count = self.stream.extend(tokens[:end])
        if end is not None and not self.stream.stopped:
            count += 1
        self.has_ended = self.stream.stopped or end is not None
        self.tokens += tokens[:count]
        self.logprobs += logprobs[:count]
        self.text += new
        return new, count

    def end(self) -> str:
        """Finish the text; returns the part that was held back until now."""
        rest = self.stream.rest()
        self.text += rest
        return rest

    def completion(self) -> Completion:
        finish = "stop" if self.has_ended else "length"
        return Completion(self.prompt, self.text, self.tokens, self.logprobs, finish, self.seed)


class Generator:
    """A trained model with its tokenizer, ready to generate.

    stats: the speed of everything generated so far.

    Args:
        model: in eval mode.
        name: name of the run, for messages.
        settings: the defaults for calls without a request, and the template for questions.
        training: facts about the training, from the export.
        draft: proposes tokens, several of which the model judges in one pass (utils/inference/speculative.py): a
            Generator of a smaller model, or "ngram" for the text itself. Sequences are then generated one by one.
        draft_tokens: number of tokens that the draft proposes at a time.

    Raises:
        UserError: the draft has another tokenizer, draft_tokens do not fit into a context, or there is a draft on MPS.

    >>> generator = Generator.from_run("baseline")
    >>> completion = generator.generate("The ", Request(max_new_tokens=20, seed=1))
    >>> len(completion.tokens), completion.text == generator.generate("The ", Request(max_new_tokens=20, seed=1)).text
    (20, True)
    """

    def __init__(
        self,
        model: LanguageModel,
        tokenizer: Tokenizer,
        name: str = "",
        settings: InferenceConfig | None = None,
        training: Mapping[str, Any] | None = None,
        draft: Generator | Literal["ngram"] | None = None,
        draft_tokens: int = PROPOSED,
    ) -> None:
        self.model, self.tokenizer, self.name, self.training = model, tokenizer, name, training or {}
        self.settings = settings or InferenceConfig()
        self.stats = GenerationStats()
        self._decoders = StaticDecoders()
        device = next(model.parameters()).device
        self._is_static = is_static(device)
        self._scoring_model = lambda: model
        self._speculators: Speculators | None = None
        if draft is not None:
            if device.type == "mps":
                raise UserError("a draft needs double precision, which MPS does not have")
            models = {"the model": model}
            if draft != "ngram":
                check_draft(self, draft)
                models["the draft"] = draft.model
            for which, each in models.items():
                if draft_tokens + 2 > (context := each.config.block_size):
                    message = f"draft-tokens must be at most {context - 2}, not {draft_tokens}"
                    raise UserError(f"{message}: {which} sees only {context} tokens")
            self._speculators = Speculators(None if draft == "ngram" else draft.model, draft_tokens)

    @classmethod
    def from_run(
        cls,
        run: str | os.PathLike[str] | None = None,
        runs_dir: str | Path | None = None,
        device: str = "auto",
        weights: WeightsChoice = "auto",
        draft: str | os.PathLike[str] | None = None,
        draft_tokens: int = PROPOSED,
    ) -> Generator:
        """Load the export of a run.

        Section `inference` of configs/ has the defaults for calls without a request, and the template for questions.

        Args:
            run: a path, id, tag, part of an id, or "latest"; None: the newest run with an export.
            weights: auto: bfloat16 on a GPU with bfloat16 units, otherwise float32; scores are in float32 on both.
            draft: a run, named like `run`, or "ngram": see `Generator`.

        Raises:
            UserError: no such run, export or device, a damaged export, int8 on a GPU, or a draft that does not fit.
        """
        config = ConfigLoader(PROJECT_ROOT).load().config
        folder = PROJECT_ROOT / expand_home(os.fspath(runs_dir or config.tracking.runs_dir))
        return cls.from_export(
            find_export(None if run is None else os.fspath(run), folder),
            device,
            weights,
            config.inference,
            find_draft(None if draft is None else os.fspath(draft), folder),
            draft_tokens,
        )

    @classmethod
    def from_export(
        cls,
        folder: Path,
        device: str = "auto",
        weights: WeightsChoice = "auto",
        settings: InferenceConfig | None = None,
        draft: Path | Literal["ngram"] | None = None,
        draft_tokens: int = PROPOSED,
    ) -> Generator:
        """Load the export in `folder`, with an optional draft from another such folder. See `from_run`.

        Raises:
            UserError: no such device, a damaged export, int8 on a GPU, or a draft that does not fit.
        """
        place = choose_device(device)
        export, chosen = load_export(folder, place), choose_weights(weights, place)
        name = str(export.training.get("run", folder))
        helper = cls.from_export(draft, device, weights) if isinstance(draft, Path) else draft
        model = with_weights(export.model, chosen)
        generator = cls(model, export.tokenizer, name, settings, export.training, helper, draft_tokens)
        if weights == "auto" and chosen != "float32":
            generator._scoring_model = functools.cache(lambda: load_export(folder, place).model)
        return generator

    @property
    def ends(self) -> frozenset[int]:
        """The tokens that end a text: the end-of-text token, if the model was trained on whole documents."""
        end = document_token(self.tokenizer, self.training)
        return frozenset() if end is None else frozenset({end})

    def generate(self, prompt: str, request: Request | None = None) -> Completion:
        """Complete one prompt."""
        (completion,) = self.completions([prompt], request)
        return completion

    def generate_batch(
        self, prompts: Sequence[str], request: Request | None = None, batch_size: int | None = None
    ) -> list[Completion]:
        """Complete each prompt, `batch_size` of them at a time; a batch ends when all of its sequences have ended.

        Args:
            batch_size: by default 16, or 1 with a draft.

        Raises:
            UserError: part of a prompt has no token, batch_size is below 1, or above 1 with a draft, the model is in
                training mode, or its logits are NaN.
        """
        return list(self.completions(prompts, request, batch_size))

    def completions(
        self, prompts: Sequence[str], request: Request | None = None, batch_size: int | None = None
    ) -> Iterator[Completion]:
        """Yield the completions of `generate_batch`, those of each batch as soon as it is done."""
        if batch_size is None:
            batch_size = BATCH_SIZE if self._speculators is None else 1
        if batch_size < 1:
            raise UserError(f"batch_size must be at least 1, not {batch_size}")
        if batch_size > 1 and self._speculators is not None:
            raise UserError(f"a draft works on one sequence at a time: batch_size must be 1, not {batch_size}")
        request = request or Request.configured(self.settings)
        for first in range(0, len(prompts), batch_size):
            sequences = self._sequences(prompts[first : first + batch_size], request, first)
            for _ in self._grow(sequences, request):
                pass
            yield from (sequence.completion() for sequence in sequences)

    def generate_qa(self, question: str, request: Request | None = None) -> Completion:
        """Answer a question, put into `qa_template`; the answer ends before `qa_stop`."""
        return self.generate(self.qa_prompt(question), self.qa_request(request))

    def qa_prompt(self, question: str) -> str:
        """The prompt for a question: `qa_template` with the question in it.

        Raises:
            UserError: part of the question or the template has no token.
        """
        self.tokenizer.encode(question)  # so that an error gives the position in the question
        template = self.settings.qa_template
        try:
            self.tokenizer.encode(template.replace("{question}", ""))
        except TokenizerError as error:
            raise UserError(f"qa_template {template!r}: {error}") from None
        return template.replace("{question}", question)

    def qa_request(self, request: Request | None = None) -> Request:
        """The request with `qa_stop` as an additional stop string."""
        request = request or Request.configured(self.settings)
        return replace(request, stops=(*request.stops, self.settings.qa_stop)) if self.settings.qa_stop else request

    def stream(self, prompt: str, request: Request | None = None) -> Iterator[str]:
        """Yield the text after a prompt in whole characters, each piece as soon as no later token can change it."""
        request = request or Request.configured(self.settings)
        for new in self._grow(self._sequences([prompt], request, 0), request):
            if new[0]:
                yield new[0]

    def score(self, text: str) -> Score:
        """Score how well the model predicts a text, in float32 unless other weights were asked for.

        Raises:
            TokenizerError: part of the text has no token.
            UserError: the model is in training mode.
        """
        self._check_mode()
        return score(self._scoring_model(), self.tokenizer, text, document_token(self.tokenizer, self.training))

    def _check_mode(self) -> None:
        """Raise UserError if the model is in training mode, because its dropout would change the results."""
        if self.model.training:
            raise UserError("the model is in training mode: call model.eval() first")

    def _sequences(self, prompts: Sequence[str], request: Request, first: int) -> list[_Sequence]:
        return [
            _Sequence(prompt, request.seed + first + index, TextStream(self.tokenizer, request.stops), self.ends)
            for index, prompt in enumerate(prompts)
        ]

    def _blocks(self, sequences: Sequence[_Sequence], request: Request) -> Iterator[Block]:
        """Yield the new tokens of the sequences."""
        self._check_mode()
        begin = document_token(self.tokenizer, self.training)
        prompts = [start_tokens(self.tokenizer, sequence.prompt, begin) for sequence in sequences]
        seeds = [sequence.seed for sequence in sequences]
        count, options = request.max_new_tokens, request.options
        if self._speculators is not None:
            if request.window != "sliding":
                raise UserError(f"a draft needs window sliding, not {request.window}")
            return self._speculators.generate(self.model, prompts[0], count, options, seeds[0])
        if request.window == "sliding" and self._is_static:
            return self._decoders.generate(self.model, prompts, count, options, seeds)
        return generate_blocks(self.model, prompts, count, options, seeds, request.window)

    def _grow(self, sequences: Sequence[_Sequence], request: Request) -> Iterator[list[str]]:
        """Yield the new text of each sequence, block by block, until all have ended."""
        began = time.perf_counter()
        is_first = True
        for block in self._blocks(sequences, request):
            if any(math.isnan(sum(row)) for row in block.logprobs):
                raise UserError("the model's logits are NaN: its training diverged")
            news, counts = zip(*map(_Sequence.extend, sequences, block.tokens, block.logprobs), strict=True)
            seconds = time.perf_counter() - began  # without the time that the caller takes between blocks
            if is_first:
                self.stats.add_prefill(block.context, seconds)
            else:
                self.stats.add_block(block, sum(counts), seconds)
            is_first = False
            yield list(news)
            if all(sequence.has_ended for sequence in sequences):
                break
            began = time.perf_counter()
        yield [sequence.end() for sequence in sequences]


def find_draft(draft: str | None, runs_dir: Path) -> Path | Literal["ngram"] | None:
    """The folder of the export that --draft names, or "ngram".

    Raises:
        UserError: no such run or export.
    """
    if draft == "ngram":
        return "ngram"
    return None if draft is None else find_export(draft, runs_dir)


def check_draft(generator: Generator, draft: Generator) -> None:
    """Raises UserError unless the draft's tokens are those of the generator's model."""
    ours, theirs = generator.tokenizer, draft.tokenizer
    if ours.hash() != theirs.hash():
        names = f"{draft.name or 'the draft'} cannot draft for {generator.name or 'the model'}"
        kinds = f"({theirs.kind}, {theirs.vocab_size:,} tokens, not {ours.kind}, {ours.vocab_size:,} tokens)"
        raise UserError(f"{names}: it has a different tokenizer {kinds}")
