"""A run as a model of lm-evaluation-harness [Gao et al. 2024], the package lm_eval.

It scores, truncates and generates as the package's own class for transformers (HFLM) does with the same weights, so its
results compare with published ones. It is faster, because continuations of the same context share its keys and values,
and logits are computed only for continuations.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import tokenizers
import torch
import torch.nn.functional as F
from lm_eval.api.model import TemplateLM
from lm_eval.models.utils import handle_stop_sequences, normalize_gen_kwargs, postprocess_generated_text
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

from model import LanguageModel
from tokenizer import Tokenizer, TokenizerError
from utils.errors import UserError
from utils.evaluation.weights import Trained
from utils.files import read_json_or_empty
from utils.inference.decode import generate_blocks, new_cache, padded, start_tokens
from utils.inference.sampling import SamplingOptions
from utils.inference.scoring import LOGITS_AT_ONCE
from utils.inference.text_stream import TextStream
from utils.nn.kv_cache import KVCache
from utils.nn.lean import lean
from utils.runs.layout import PRETRAINED
from utils.terminal.progress import CompletionProgress

BATCH_SIZE = 32  # sequences in one pass
GENERATED = 256  # tokens of an answer if the task does not say, as in HFLM
SEED = 1337


@dataclass
class _Stem:
    """The context that one or more continuations share.

    tokens: those of the context; if there is only one continuation, also its tokens, except for the last.
    """

    tokens: list[int]
    members: list[_Scored] = field(default_factory=list)

    @property
    def branches(self) -> list[_Scored]:
        """The continuations that need a further forward pass after the stem."""
        return [] if len(self.members) == 1 else [one for one in self.members if len(one.targets) > 1]

    @property
    def longest_branch(self) -> int:
        return max((len(one.targets) - 1 for one in self.branches), default=0)


@dataclass
class _Scored:
    """A continuation that is being scored: its tokens, and the result so far."""

    targets: list[int]
    logprob: float = 0.0
    greedy: bool = True

    def add(self, logprobs: Sequence[float], greedy: Sequence[bool]) -> None:
        self.logprob += sum(logprobs)
        self.greedy = self.greedy and all(greedy)


class HarnessModel(TemplateLM):
    """The model of a run, for the tasks of lm-evaluation-harness.

    Args:
        batch_size: sequences in one pass; affects results only by rounding (1e-4 nats in float32).
    """

    def __init__(self, trained: Trained, batch_size: int = BATCH_SIZE) -> None:
        super().__init__()
        self.trained, self.batch_size = trained, batch_size
        self.model, self._lean = trained.model, lean(trained.model)
        self.max_length = self.model.config.block_size
        self._device = next(self.model.parameters()).device
        # HFLM allows answers of 256 tokens, and refuses a shorter context.
        self.max_gen_toks = GENERATED if self.max_length > GENERATED else max(self.max_length // 2, 1)
        self._prefix, self._before = prefix_token(trained), tokens_before(trained.tokenizer)

    @property
    def eot_token_id(self) -> int:
        """The token before a text that has no context: see `prefix_token`."""
        return self._prefix

    @property
    def tokenizer_name(self) -> str:
        return f"{self.trained.tokenizer.kind}-{self.trained.tokenizer.hash()[:16]}"

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_: Any) -> list[int]:
        """Token ids of a text, after those that its tokenizer puts before each text.

        Args:
            add_special_tokens: False: leave out the tokens before the text.

        Raises:
            UserError: part of the text has no token.
        """
        try:
            return [*([] if add_special_tokens is False else self._before), *self.trained.tokenizer.encode(string)]
        except TokenizerError as error:
            raise UserError(f"{self.trained.name} cannot read this task: {error}") from None

    def loglikelihood_rolling(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[float]:
        """The log-probability of each whole text, in nats; disjoint windows predict each token once."""
        windows = []
        for number, request in enumerate(requests):
            tokens = self.tok_encode(request.args[0])
            for window in get_rolling_token_windows(tokens, self.prefix_token_id, self.max_length, 1):
                windows.append((number, *make_disjoint_window(window)))
        totals = [0.0] * len(requests)
        for (number, *_), (logprob, _) in zip(windows, self._loglikelihood_tokens(windows), strict=True):
            totals[number] += logprob
        return totals

    def _loglikelihood_tokens(self, requests: Sequence[Any], **_: Any) -> list[tuple[float, bool]]:
        """The log-probability of each continuation, and whether greedy decoding gives it.

        Args:
            requests: (anything, tokens of the context, tokens of the continuation). If both are too long for the model,
                they are truncated from the left.
        """
        stems: dict[tuple[int, ...], _Stem] = {}
        scored = []
        for _, context, continuation in requests:
            if len(continuation) > self.max_length:
                raise UserError(
                    f"{self.trained.name}: an answer of {len(continuation):,} tokens does not fit into block_size "
                    f"{self.max_length:,}"
                )
            scored.append(_Scored(list(continuation)))
            if continuation:
                whole = [*(context or [self._prefix]), *continuation][-(self.max_length + 1) :]
                before = whole[: -len(continuation)]
                stems.setdefault(tuple(before), _Stem(before)).members.append(scored[-1])
        for stem in stems.values():
            if len(stem.members) == 1:
                stem.tokens = [*stem.tokens, *stem.members[0].targets[:-1]]
        with CompletionProgress(len(scored), noun="answer") as progress:
            for batch in self._batches(list(stems.values())):
                self._score(batch)
                members = [one for stem in batch for one in stem.members]
                progress.advance(sum(len(one.targets) for one in members), len(members))
        return [(one.logprob, one.greedy) for one in scored]

    def _batches(self, stems: list[_Stem]) -> Iterator[list[_Stem]]:
        """Batches of stems of similar length, the longest first, such that padded branches fit into the context."""
        batch: list[_Stem] = []
        longest = 0
        for stem in sorted(stems, key=lambda stem: (-len(stem.tokens), -stem.longest_branch)):
            branch = max(longest, stem.longest_branch)
            fits = not batch or len(batch[0].tokens) + branch <= self.max_length
            if len(batch) == self.batch_size or not fits:
                yield batch
                batch, longest = [], 0
            batch.append(stem)
            longest = max(longest, stem.longest_branch)
        if batch:
            yield batch

    @torch.inference_mode()
    def _score(self, batch: list[_Stem]) -> None:
        """Score the continuations of a batch of stems."""
        idx, lengths = padded([stem.tokens for stem in batch], self._device)  # (B, T)
        has_branches = any(stem.branches for stem in batch)
        cache = new_cache(self.model, len(batch), idx.size(1)) if has_branches else None
        hidden = self._lean.hidden(idx, cache, lengths if cache is not None else None)  # (B, T, C)
        places = []  # row, position of the first hidden state that predicts a target, continuation, targets
        for row, (stem, length) in enumerate(zip(batch, lengths, strict=True)):
            for one in stem.members:
                targets = one.targets if len(stem.members) == 1 else one.targets[:1]
                places.append((row, length - len(targets), one, targets))
        self._add_logprobs(hidden, places)
        if cache is not None:
            pairs = [(row, one) for row, stem in enumerate(batch) for one in stem.branches]
            pairs.sort(key=lambda pair: len(pair[1].targets))  # so that there is little padding
            for first in range(0, len(pairs), self.batch_size):
                part = pairs[first : first + self.batch_size]
                idx, _ = padded([one.targets[:-1] for _, one in part], self._device)
                branch = branched(self.model, cache, [row for row, _ in part], idx.size(1))
                hidden = self._lean.hidden(idx, branch)
                self._add_logprobs(hidden, [(row, 0, one, one.targets[1:]) for row, (_, one) in enumerate(part)])

    def _add_logprobs(self, hidden: torch.Tensor, places: Sequence[tuple[int, int, _Scored, Sequence[int]]]) -> None:
        """Add the log-probabilities of targets to their continuations.

        Args:
            hidden: (B, T, C), the input of the output head.
            places: row and position of the hidden state that predicts the first target, continuation, targets.
        """
        device = hidden.device
        rows = torch.tensor([row for row, _, _, targets in places for _ in targets], device=device)
        columns = torch.tensor(
            [first + i for _, first, _, targets in places for i in range(len(targets))], device=device
        )
        targets = torch.tensor([token for *_, tokens in places for token in tokens], device=device)  # (n,)
        logprobs: list[float] = []
        greedy: list[bool] = []
        at_once = max(LOGITS_AT_ONCE // self.model.vocab_size, 1)
        for part in range(0, len(targets), at_once):
            chosen = slice(part, part + at_once)
            logits = self._lean.head_logits(hidden[rows[chosen], columns[chosen]]).float()  # (n, V)
            logprobs += (-F.cross_entropy(logits, targets[chosen], reduction="none")).tolist()
            greedy += (logits.argmax(-1) == targets[chosen]).tolist()
        begin = 0
        for _, _, one, tokens in places:
            end = begin + len(tokens)
            one.add(logprobs[begin:end], greedy[begin:end])
            begin = end

    def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[str]:
        """The text generated after each context, up to a stop string or end-of-text; greedy unless the task samples."""
        found = [""] * len(requests)
        groups: dict[str, list[tuple[list[int], int]]] = {}
        for number, request in enumerate(requests):
            context, settings = request.args
            groups.setdefault(repr(settings), []).append((self.tok_encode(context) or [self._prefix], number))
        with CompletionProgress(len(requests), noun="answer") as progress:
            for members in groups.values():
                options = normalize_gen_kwargs(requests[members[0][1]].args[1], self.max_gen_toks)
                members.sort(key=lambda member: -len(member[0]))
                for first in range(0, len(members), self.batch_size):
                    contexts, numbers = zip(*members[first : first + self.batch_size], strict=True)
                    texts, count = self._generate(contexts, options, numbers)
                    for number, text in zip(numbers, texts, strict=True):
                        found[number] = text
                    progress.advance(count, len(numbers))
        return found

    def _generate(
        self, contexts: Sequence[list[int]], settings: dict[str, Any], numbers: Sequence[int]
    ) -> tuple[list[str], int]:
        """The texts generated after the contexts, and their total number of tokens.

        Args:
            settings: settings of the task, as `normalize_gen_kwargs` returns them.
            numbers: numbers of the requests, which seed the sampling.
        """
        tokenizer, count = self.trained.tokenizer, int(settings["max_gen_toks"])
        if not 0 < count < self.max_length:
            raise UserError(
                f"{self.trained.name}: the task generates up to {count:,} tokens, block_size is {self.max_length:,}"
            )
        stops = handle_stop_sequences(settings.get("until"), eos=None)
        sampling = SamplingOptions(
            temperature=float(settings.get("temperature") or 0.0) if settings.get("do_sample") else 0.0,
            top_k=settings.get("top_k") or None,
            top_p=settings.get("top_p") or None,
        )
        prompts = [context[-(self.max_length - count) :] for context in contexts]
        streams, texts = [TextStream(tokenizer, stops) for _ in prompts], [""] * len(prompts)
        over, written = [False] * len(prompts), 0
        for block in generate_blocks(self.model, prompts, count, sampling, [SEED + number for number in numbers]):
            for row, tokens in enumerate(block.tokens):
                if over[row]:
                    continue
                text = tokens[: tokens.index(tokenizer.end_of_text)] if tokenizer.end_of_text in tokens else tokens
                texts[row] += streams[row].extend(text)[0]
                written += len(text)
                over[row] = len(text) < len(tokens) or streams[row].stopped
            if all(over):
                break
        texts = [text + stream.rest() for text, stream in zip(texts, streams, strict=True)]
        return [postprocess_generated_text(text, stops, None) for text in texts], written


def prefix_token(trained: Trained) -> int:
    """The token that HFLM puts before a text without a context.

    For a pretrained model it is the model's bos_token, or else its eos_token; for other models end-of-text, or a line
    break or token 0 if the vocabulary has none.
    """
    tokenizer, run = trained.tokenizer, trained.run
    names = {} if run is None else read_json_or_empty(run / PRETRAINED, run).get("tokenizer_config")
    if isinstance(names, dict) and names:
        added = {token["content"]: token["id"] for token in _specification(tokenizer).get("added_tokens") or []}
        for name in ("bos_token", "eos_token"):
            token = names.get(name)
            text = token.get("content") if isinstance(token, dict) else token
            if text in added:
                return int(added[text])
    return start_tokens(tokenizer, "")[-1] if tokenizer.end_of_text is None else tokenizer.end_of_text


def tokens_before(tokenizer: Tokenizer) -> list[int]:
    """The tokens that a tokenizer.json puts before each text in transformers, but not in training: Llama's <s>."""
    specification = _specification(tokenizer)
    if not specification.get("post_processor"):
        return []
    encoded = tokenizers.Tokenizer.from_str(json.dumps(specification)).encode("a")
    pairs = zip(encoded.ids, encoded.special_tokens_mask, strict=True)
    return [token for token, _ in itertools.takewhile(lambda pair: pair[1], pairs)]


def _specification(tokenizer: Tokenizer) -> dict[str, Any]:
    specification: dict[str, Any] = json.loads(tokenizer.huggingface())
    return specification


def branched(model: LanguageModel, cache: KVCache, rows: Sequence[int], more: int) -> KVCache:
    """A new cache with copies of these rows of `cache`, which may repeat, and room for `more` tokens in each."""
    lengths = [cache.lengths[row] for row in rows]
    longest = max(lengths)
    branch = new_cache(model, len(rows), longest + more)
    branch.keys[:, :, :, :longest] = cache.keys[:, list(rows), :, :longest]
    branch.values[:, :, :, :longest] = cache.values[:, list(rows), :, :longest]
    branch.tokens[:, :longest] = cache.tokens[list(rows), :longest]
    branch.positions.copy_(torch.tensor(lengths))
    branch.lengths = lengths
    return branch
