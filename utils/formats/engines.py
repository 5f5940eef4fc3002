"""The programs that exports are made for: each computes token ids, logits and greedy continuations by itself."""

from __future__ import annotations

import contextlib
import importlib
import importlib.metadata
import json
import string
import urllib.request
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, ClassVar, Protocol

import numpy as np
import torch

from utils.formats.gguf import MODEL as GGUF
from utils.formats.onnx_export import MODEL as GRAPH
from utils.formats.pretrained import TOKENIZER


class Engine(Protocol):
    """A program that has opened an export.

    name: of the program, for messages.
    package: the module that is imported.
    install: the package that pip installs.
    normalised: its logits are log-probabilities; those that it does not report are -inf.
    spare: tokens of the context that a prompt must leave free.
    """

    normalised: ClassVar[bool] = False
    spare: ClassVar[int] = 0
    name: ClassVar[str]
    package: ClassVar[str]
    install: ClassVar[str]

    def __init__(self, folder: Path, context: int) -> None: ...

    def encode(self, text: str) -> list[int]:
        """The token ids of a text, with no tokens added before or after it."""

    def logits(self, ids: Sequence[int]) -> torch.Tensor:
        """The logits (T, V) of a text, in float32."""

    def next_logits(self, ids: Sequence[int], count: int) -> Iterator[torch.Tensor]:
        """The logits (V,) after `ids` and after each greedy token, `count` times, with the engine's own cache."""


class Transformers(Engine):
    """The library transformers, with its tokenizer and its cache."""

    name, package, install = "transformers", "transformers", "transformers"

    def __init__(self, folder: Path, context: int) -> None:
        transformers = self._transformers = importlib.import_module("transformers")
        with quiet(transformers):
            self._tokenizer = transformers.AutoTokenizer.from_pretrained(folder, local_files_only=True)
            self._model = transformers.AutoModelForCausalLM.from_pretrained(
                folder, local_files_only=True, dtype=torch.float32
            ).eval()

    def encode(self, text: str) -> list[int]:
        with quiet(self._transformers):  # it warns about texts that are longer than the context
            return list(self._tokenizer(text, add_special_tokens=False)["input_ids"])

    def logits(self, ids: Sequence[int]) -> torch.Tensor:
        with torch.no_grad():
            return self._model(torch.tensor([list(ids)])).logits[0].float()

    def next_logits(self, ids: Sequence[int], count: int) -> Iterator[torch.Tensor]:
        idx, cache = torch.tensor([list(ids)]), None
        for _ in range(count):
            with torch.no_grad():
                found = self._model(idx, past_key_values=cache, use_cache=True)
            logits, cache = found.logits[0, -1].float(), found.past_key_values
            yield logits
            idx = logits.argmax()[None, None]


@contextlib.contextmanager
def quiet(transformers: Any) -> Iterator[None]:
    """The library transformers without its progress bars and warnings."""
    logging = transformers.logging
    level, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()


class LlamaCpp(Engine):
    """llama.cpp, as a server in this process with a float32 cache.

    The package xllamacpp has wheels; llama-cpp-python is built from source (docs/LOG.md).
    The server reports the log-probabilities of the likeliest tokens, as they are before sampling, but omits them
    if the sampled token ends within a character. So a token that is a whole character is forced by a logit bias.
    """

    name, package, install = "llama.cpp", "xllamacpp", "xllamacpp"
    normalised = True
    spare = 1  # the sampled token takes a place in the context
    top = 1000  # likeliest tokens whose logits are asked for
    positions = 4  # positions in a prompt that are compared: a request gives the logits after its last token only

    def __init__(self, folder: Path, context: int) -> None:
        xllamacpp = importlib.import_module("xllamacpp")
        params = xllamacpp.CommonParams()
        params.model.path = str(folder / GGUF)
        params.n_ctx, params.n_parallel, params.n_gpu_layers, params.warmup = context, 1, 0, False
        params.verbosity = -1
        params.cpuparams.n_threads = 1  # several would wait for each other in busy loops
        params.cache_type_k = params.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
        params.flash_attn_type = xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED  # rounds to float16
        self._server = xllamacpp.Server(params)
        self._vocab_size = int(self._ask("/v1/models")["data"][0]["meta"]["n_vocab"])
        self._forced = next(ids[0] for text in string.printable if len(ids := self.encode(text)) == 1)

    def _ask(self, path: str, content: Any = None) -> Any:
        body = None if content is None else json.dumps(content).encode()
        request = urllib.request.Request(
            self._server.listening_address + path, body, {"Content-Type": "application/json"}
        )
        with urllib.request.urlopen(request) as answer:
            return json.load(answer)

    def encode(self, text: str) -> list[int]:
        return list(self._ask("/tokenize", {"content": text, "add_special": False, "parse_special": False})["tokens"])

    def _after(self, ids: Sequence[int]) -> torch.Tensor:
        """The logits (V,) after ids; -inf for tokens that are not among the likeliest."""
        found = self._server.handle_completions(
            {
                "prompt": list(ids),
                "n_predict": 1,
                "temperature": 0,
                "n_probs": min(self.top, self._vocab_size),
                "logit_bias": [[self._forced, 1e4]],
                "cache_prompt": True,
            }
        )
        logits = torch.full((self._vocab_size,), -torch.inf)
        for token in found["choices"][0]["logprobs"]["content"][0]["top_logprobs"]:
            logits[token["id"]] = token["logprob"]
        return logits

    def logits(self, ids: Sequence[int]) -> torch.Tensor:
        found = torch.full((len(ids), self._vocab_size), -torch.inf)
        for position in sorted({len(ids) * part // self.positions - 1 for part in range(1, self.positions + 1)} - {-1}):
            found[position] = self._after(ids[: position + 1])
        return found

    def next_logits(self, ids: Sequence[int], count: int) -> Iterator[torch.Tensor]:
        ids = list(ids)
        for _ in range(count):
            logits = self._after(ids)
            yield logits
            ids.append(int(logits.argmax()))


class OnnxRuntime(Engine):
    """onnxruntime, with the cache of the graph and the tokenizer of the package tokenizers."""

    name, package, install = "onnxruntime", "onnxruntime", "onnxruntime"

    def __init__(self, folder: Path, context: int) -> None:
        onnxruntime = importlib.import_module("onnxruntime")
        tokenizers = importlib.import_module("tokenizers")
        self._session = onnxruntime.InferenceSession(folder / GRAPH, providers=["CPUExecutionProvider"])
        self._tokenizer = tokenizers.Tokenizer.from_file(str(folder / TOKENIZER))
        self._tokenizer.encode_special_tokens = True
        self._shape = self._session.get_inputs()[2].shape

    def encode(self, text: str) -> list[int]:
        return list(self._tokenizer.encode(text, add_special_tokens=False).ids)

    def _step(self, ids: Sequence[int], position: int, keys: Any, values: Any) -> Any:
        return self._session.run(
            None,
            {
                "input_ids": np.array([list(ids)], np.int64),
                "position": np.array(position, np.int64),
                "keys": keys,
                "values": values,
            },
        )

    def logits(self, ids: Sequence[int]) -> torch.Tensor:
        empty = np.zeros(self._shape, np.float32)
        return torch.from_numpy(self._step(ids, 0, empty, empty)[0][0])

    def next_logits(self, ids: Sequence[int], count: int) -> Iterator[torch.Tensor]:
        keys = values = np.zeros(self._shape, np.float32)
        position, new = 0, list(ids)
        for _ in range(count):
            logits, keys, values = self._step(new, position, keys, values)
            position += len(new)
            new = [int(logits[0, -1].argmax())]
            yield torch.from_numpy(logits[0, -1])


ENGINES: dict[str, type[Engine]] = {"hf": Transformers, "onnx": OnnxRuntime, "gguf": LlamaCpp}


def installed(engine: type[Engine]) -> str | None:
    """The installed version of an engine; None if it cannot be imported."""
    try:
        importlib.import_module(engine.package)
    except ImportError:
        return None
    try:
        return importlib.metadata.version(engine.install)
    except importlib.metadata.PackageNotFoundError:
        return str(getattr(importlib.import_module(engine.package), "__version__", "unknown"))
