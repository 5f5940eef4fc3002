"""Text from a run, for notebooks and scripts: Generator.from_run("baseline").generate("The ")."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from model import LanguageModel
from tokenizer import CharTokenizer
from utils.cli import PROJECT_ROOT
from utils.config_loader import ConfigLoader
from utils.device import choose_device
from utils.export import load_export
from utils.generation import Window, generate, start_tokens
from utils.quantization import Weights, with_weights
from utils.run_manager import find_export
from utils.sampling import SamplingOptions
from utils.scoring import Score, score
from utils.text_stream import TextStream

MAX_NEW_TOKENS, SEED, BATCH_SIZE = 300, 1337, 16


@dataclass(frozen=True)
class Completion:
    """What was generated after a prompt.

    text: without the prompt and the stop string.
    tokens, logprobs: what was drawn, the tokens of a stop string too, and the natural logarithm of the probability
        that the model gave to each before any filter.
    finish: "stop" at a stop string, else "length".
    """

    prompt: str
    text: str
    tokens: list[int]
    logprobs: list[float]
    finish: str
    seed: int


@dataclass(frozen=True)
class Request:
    """How to generate, but for the prompt. Sequence i of a call draws from the random stream of seed + i."""

    max_new_tokens: int = MAX_NEW_TOKENS
    options: SamplingOptions = field(default_factory=SamplingOptions)
    stops: Sequence[str] = ()
    seed: int = SEED
    window: Window = "sliding"


@dataclass
class _Sequence:
    """A sequence as it grows."""

    prompt: str
    seed: int
    stream: TextStream
    text: str = ""
    tokens: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)

    def add(self, token: int, logprob: float) -> str:
        """The text that is new."""
        self.tokens.append(token)
        self.logprobs.append(logprob)
        new = self.stream.add(token)
        self.text += new
        return new

    def end(self) -> str:
        """The text that was held back until now."""
        rest = self.stream.rest()
        self.text += rest
        return rest

    def completion(self) -> Completion:
        finish = "stop" if self.stream.stopped else "length"
        return Completion(self.prompt, self.text, self.tokens, self.logprobs, finish, self.seed)


class Generator:
    """A trained model with its tokenizer, ready to generate.

    Args:
        model: in eval mode.
        name: of the run, for people.
    """

    def __init__(self, model: LanguageModel, tokenizer: CharTokenizer, name: str = "") -> None:
        self.model, self.tokenizer, self.name = model, tokenizer, name

    @classmethod
    def from_run(
        cls, run: str | None = None, runs_dir: Path | None = None, device: str = "auto", weights: Weights = "float32"
    ) -> Generator:
        """The export of a run: path, id, tag, part of an id, latest; None: the newest with an export.

        Raises:
            UserError: no such run, export or device, or a damaged export.
        """
        folder = runs_dir or PROJECT_ROOT / ConfigLoader(PROJECT_ROOT).load().config.tracking.runs_dir
        path = find_export(run, folder)
        export = load_export(path, choose_device(device))
        return cls(with_weights(export.model, weights), export.tokenizer, str(export.training.get("run_id", path)))

    def generate(self, prompt: str, request: Request | None = None) -> Completion:
        """One completion."""
        (completion,) = self.generate_batch([prompt], request)
        return completion

    def generate_batch(
        self, prompts: Sequence[str], request: Request | None = None, batch_size: int = BATCH_SIZE
    ) -> list[Completion]:
        """A completion of each prompt, `batch_size` of them at a time; a batch ends when all of its sequences have.

        Raises:
            TokenizerError: a character of a prompt without a token.
        """
        request, completions = request or Request(), []
        for first in range(0, len(prompts), batch_size):
            sequences = self._sequences(prompts[first : first + batch_size], request, first)
            for _ in self._grow(sequences, request):
                pass
            completions += [sequence.completion() for sequence in sequences]
        return completions

    def stream(self, prompt: str, request: Request | None = None) -> Iterator[str]:
        """The text after a prompt, in whole characters, as soon as it is certain."""
        request = request or Request()
        for new in self._grow(self._sequences([prompt], request, 0), request):
            if new[0]:
                yield new[0]

    def score(self, text: str) -> Score:
        """How well the model predicts a text.

        Raises:
            TokenizerError: a character without a token.
        """
        return score(self.model, self.tokenizer, text)

    def _sequences(self, prompts: Sequence[str], request: Request, first: int) -> list[_Sequence]:
        return [
            _Sequence(prompt, request.seed + first + index, TextStream(self.tokenizer, request.stops))
            for index, prompt in enumerate(prompts)
        ]

    def _grow(self, sequences: Sequence[_Sequence], request: Request) -> Iterator[list[str]]:
        """The new text of each sequence, step by step, until all have ended."""
        prompts = [start_tokens(self.tokenizer, sequence.prompt) for sequence in sequences]
        seeds = [sequence.seed for sequence in sequences]
        for step in generate(self.model, prompts, request.max_new_tokens, request.options, seeds, request.window):
            chances = step.logits.float().log_softmax(-1).gather(-1, step.tokens[:, None])[:, 0]  # (B,)
            rows = zip(sequences, step.tokens.tolist(), chances.tolist(), strict=True)
            yield ["" if row.stream.stopped else row.add(token, logprob) for row, token, logprob in rows]
            if all(sequence.stream.stopped for sequence in sequences):
                return
        yield [sequence.end() for sequence in sequences]
