"""Programs that open an export: each gives its own token ids, logits and greedy continuations."""

from __future__ import annotations

import contextlib
import importlib
import importlib.metadata
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, ClassVar, Protocol

import numpy as np
import torch

from utils.formats.gguf import MODEL as GGUF
from utils.formats.onnx_export import MODEL as GRAPH
from utils.formats.pretrained import TOKENIZER


class Engine(Protocol):
    """A program with an export open.

    name: as people know it.
    package: as Python imports it.
    install: as pip knows it.
    """

    name: ClassVar[str]
    package: ClassVar[str]
    install: ClassVar[str]

    def __init__(self, folder: Path, context: int) -> None: ...

    def encode(self, text: str) -> list[int]:
        """The token ids of a text, without tokens before or after it."""

    def logits(self, ids: Sequence[int]) -> torch.Tensor:
        """(T, V), in float32, for a text from its start."""

    def next_logits(self, ids: Sequence[int], count: int) -> Iterator[torch.Tensor]:
        """(V,) after `ids` and after each likeliest token that follows, `count` in all, with the engine's own cache."""


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
        with quiet(self._transformers):  # it warns of texts that are longer than the context
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
    """llama.cpp, with a cache in float32."""

    name, package, install = "llama.cpp", "llama_cpp", "llama-cpp-python"

    def __init__(self, folder: Path, context: int) -> None:
        llama_cpp = importlib.import_module("llama_cpp")
        self._model = llama_cpp.Llama(
            str(folder / GGUF),
            n_ctx=context,
            n_batch=context,
            n_threads=len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
            n_gpu_layers=0,
            logits_all=True,
            type_k=llama_cpp.GGML_TYPE_F32,
            type_v=llama_cpp.GGML_TYPE_F32,
            verbose=False,
        )

    def encode(self, text: str) -> list[int]:
        return list(self._model.tokenize(text.encode(), add_bos=False, special=False))

    def logits(self, ids: Sequence[int]) -> torch.Tensor:
        self._model.reset()
        self._model.eval(list(ids))
        return torch.from_numpy(np.array(self._model.scores[: len(ids)], dtype=np.float32))

    def next_logits(self, ids: Sequence[int], count: int) -> Iterator[torch.Tensor]:
        logits = self.logits(ids)[-1]
        for number in range(count):
            yield logits
            if number + 1 < count:
                self._model.eval([int(logits.argmax())])
                logits = torch.from_numpy(np.array(self._model.scores[len(ids) + number], dtype=np.float32))


class OnnxRuntime(Engine):
    """onnxruntime, with the cache of the graph; the tokenizer is that of the package tokenizers."""

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
    """The version of an engine; None if it cannot be imported."""
    try:
        importlib.import_module(engine.package)
    except ImportError:
        return None
    try:
        return importlib.metadata.version(engine.install)
    except importlib.metadata.PackageNotFoundError:
        return str(getattr(importlib.import_module(engine.package), "__version__", "unknown"))
