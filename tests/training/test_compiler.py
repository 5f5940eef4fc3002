"""Regional compilation: the loss of the uncompiled model, with one compiled block for all layers."""

from __future__ import annotations

import os
import pwd
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any, NoReturn

import pytest
import torch
from torch._dynamo.utils import counters
from torch._inductor.async_compile import AsyncCompile

import utils.training.compiler as compiler
from model import LanguageModel
from utils.config.settings import ModelConfig
from utils.training.compiler import begin_compiler, compiled_loss, compiler_options, hash_triton

CPU = torch.device("cpu")
IDX = torch.randint(50, (2, 17), generator=torch.Generator().manual_seed(0))
SHAPE = {"n_layer": 4, "n_head": 2, "n_embd": 32, "block_size": 16}
KINDS = [
    {},
    {"position": "rope", "norm": "rmsnorm", "qk_norm": True, "mlp": "relu2", "tie_embeddings": False},
    {"ngram_rows": [20], "mlp": "swiglu", "position": "rope"},
]


@pytest.fixture(autouse=True)
def without_inductor(monkeypatch: pytest.MonkeyPatch) -> None:
    """Traces without generating code, which would take seconds."""
    monkeypatch.setattr(compiler, "compiler_options", lambda _device, _mode: {"backend": "aot_eager"})
    torch._dynamo.reset()
    counters.clear()


def model_of(kind: dict[str, Any], model_class: type[LanguageModel] = LanguageModel) -> LanguageModel:
    torch.manual_seed(0)
    return model_class(ModelConfig.model_validate({**SHAPE, **kind}), vocab_size=50)


def test_a_user_without_a_home_folder_can_compile(monkeypatch: pytest.MonkeyPatch) -> None:
    """Importing the module used to raise in containers where the user id has no account."""

    def unknown(_user: int) -> NoReturn:
        raise KeyError

    for name in ("HOME", "XDG_CACHE_HOME", "TORCHINDUCTOR_CACHE_DIR"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(pwd, "getpwuid", unknown)
    compiler.begin_compiler(CPU)
    assert "TORCHINDUCTOR_CACHE_DIR" not in os.environ
    monkeypatch.setenv("XDG_CACHE_HOME", "/caches")
    assert compiler.cache_folder() == Path("/caches/workbench/compiled")


@pytest.mark.parametrize(("recomputes", "document_token"), [(False, None), (True, None), (False, 7)])
@pytest.mark.parametrize("kind", KINDS)
def test_all_layers_share_one_compiled_block(
    kind: dict[str, Any], recomputes: bool, document_token: int | None
) -> None:
    losses, gradients = [], []
    for compiled in (False, True):
        model = model_of(kind)
        model.recomputes, model.document_token = recomputes, document_token
        loss = compiled_loss(model, CPU, "default", 32) if compiled else model.loss
        losses.append(loss(IDX[:, :-1], IDX[:, 1:]))
        losses[-1].backward()
        gradients.append([parameter.grad for parameter in model.parameters()])
    torch.testing.assert_close(losses[1], losses[0])
    torch.testing.assert_close(gradients[1], gradients[0])
    assert counters["stats"]["unique_graphs"] == 3  # before the blocks, one block, after the blocks


def test_an_overridden_forward_pass_keeps_its_loss() -> None:
    class Doubled(LanguageModel):
        def hidden(self, *arguments: Any, **keywords: Any) -> torch.Tensor:
            return 2 * super().hidden(*arguments, **keywords)

    model = model_of({}, Doubled)
    expected = model.loss(IDX[:, :-1], IDX[:, 1:])
    torch.testing.assert_close(compiled_loss(model, CPU, "default", 32)(IDX[:, :-1], IDX[:, 1:]), expected)


@pytest.mark.parametrize("mode", ["default", "reduce-overhead", "max-autotune"])
def test_each_device_has_its_options(mode: str) -> None:
    assert compiler_options(torch.device("mps"), mode) == {"backend": "aot_eager"}
    assert compiler_options(CPU, mode)["mode"] == compiler.MODES[mode]
    of_cuda = compiler_options(torch.device("cuda"), mode)["options"]
    assert of_cuda["fallback_random"]
    assert not of_cuda.get("triton.cudagraphs")


def test_options_that_this_version_of_torch_does_not_have_are_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    known = torch._inductor.list_options()
    assert compiler_options(torch.device("cuda"), "default") == {"options": compiler.FASTER_ON_CUDA}
    monkeypatch.setattr(torch._inductor, "list_options", lambda: [name for name in known if "mix_order" not in name])
    assert compiler_options(torch.device("cuda"), "default") == {"options": {"fallback_random": True}}


@pytest.fixture
def no_hash_yet() -> Iterator[None]:
    """Forgets the hash of Triton, as in a process that has compiled nothing yet."""
    hash_triton.cache_clear()
    yield
    hash_triton.cache_clear()


@pytest.mark.usefixtures("no_hash_yet")
def test_triton_is_hashed_in_a_thread_before_anything_is_compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    done, hashed = threading.Event(), list[threading.Thread]()

    def triton_key() -> None:
        done.wait()
        hashed.append(threading.current_thread())

    cache = ModuleType("triton.runtime.cache")
    cache.triton_key = triton_key  # type: ignore[attr-defined]
    for name in ("triton", "triton.runtime"):
        monkeypatch.setitem(sys.modules, name, ModuleType(name))
    monkeypatch.setitem(sys.modules, "triton.runtime.cache", cache)
    begin_compiler(CPU)
    begin_compiler(CPU)
    assert not hashed
    done.set()
    compiled_loss(model_of({}), CPU, "default", 32)
    (thread,) = hashed
    assert thread is hash_triton() is not threading.main_thread()


@pytest.mark.usefixtures("no_hash_yet")
def test_without_triton_nothing_is_hashed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "triton.runtime.cache", None)
    begin_compiler(CPU)
    assert hash_triton() is None
    compiled_loss(model_of({}), CPU, "default", 32)


@pytest.mark.usefixtures("no_hash_yet")
def test_on_cuda_the_compile_workers_start_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "triton.runtime.cache", None)
    woken = list[str]()
    monkeypatch.setattr(AsyncCompile, "wakeup", lambda: woken.append("pool"))
    begin_compiler(CPU)
    assert woken == []
    begin_compiler(torch.device("cuda"))
    assert woken == ["pool"]
    monkeypatch.delattr(AsyncCompile, "wakeup")  # another version of torch
    begin_compiler(torch.device("cuda"))
