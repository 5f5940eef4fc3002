"""Regional compilation: the loss of the model, from one code for all layers."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from types import ModuleType
from typing import Any

import pytest
import torch
from conftest import ROOT
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
    """Trace, but generate no code, which takes seconds."""
    monkeypatch.setattr(compiler, "compiler_options", lambda _device, _mode: {"backend": "aot_eager"})
    torch._dynamo.reset()
    counters.clear()


def model_of(kind: dict[str, Any], model_class: type[LanguageModel] = LanguageModel) -> LanguageModel:
    torch.manual_seed(0)
    return model_class(ModelConfig.model_validate({**SHAPE, **kind}), vocab_size=50)


@pytest.mark.parametrize(("recomputes", "document_token"), [(False, None), (True, None), (False, 7)])
@pytest.mark.parametrize("kind", KINDS)
def test_all_layers_share_one_code(kind: dict[str, Any], recomputes: bool, document_token: int | None) -> None:
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
    assert counters["stats"]["unique_graphs"] == 3  # what precedes the blocks, a block, what follows them


def test_a_forward_pass_of_another_kind_is_compiled_as_it_is() -> None:
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


def test_options_that_this_torch_does_not_have_are_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    known = torch._inductor.list_options()
    assert compiler_options(torch.device("cuda"), "default") == {"options": compiler.FASTER_ON_CUDA}
    monkeypatch.setattr(torch._inductor, "list_options", lambda: [name for name in known if "mix_order" not in name])
    assert compiler_options(torch.device("cuda"), "default") == {"options": {"fallback_random": True}}


@pytest.fixture
def nothing_hashed() -> Iterator[None]:
    """As in a process that has not compiled anything."""
    hash_triton.cache_clear()
    yield
    hash_triton.cache_clear()


@pytest.mark.usefixtures("nothing_hashed")
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


@pytest.mark.usefixtures("nothing_hashed")
def test_without_triton_nothing_is_hashed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "triton.runtime.cache", None)
    begin_compiler(CPU)
    assert hash_triton() is None
    compiled_loss(model_of({}), CPU, "default", 32)


@pytest.mark.usefixtures("nothing_hashed")
def test_on_cuda_the_processes_that_compile_start_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "triton.runtime.cache", None)
    woken = list[str]()
    monkeypatch.setattr(AsyncCompile, "wakeup", lambda: woken.append("pool"))
    begin_compiler(CPU)
    assert woken == []
    begin_compiler(torch.device("cuda"))
    assert woken == ["pool"]
    monkeypatch.delattr(AsyncCompile, "wakeup")  # another version of torch
    begin_compiler(torch.device("cuda"))


def test_a_user_without_a_home_can_train() -> None:
    code = "import os, pwd; pwd.getpwuid = lambda uid: (_ for _ in ()).throw(KeyError(uid))\n"
    code += "import torch, utils.training.session\nfrom utils.training.compiler import begin_compiler\n"
    code += "begin_compiler(torch.device('cpu')); print(os.environ.get('TORCHINDUCTOR_CACHE_DIR'))"
    unset = ("HOME", "XDG_CACHE_HOME", "TORCHINDUCTOR_CACHE_DIR")
    env = {name: value for name, value in os.environ.items() if name not in unset}
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=env, capture_output=True, text=True)
    assert result.stdout == "None\n", result.stderr
