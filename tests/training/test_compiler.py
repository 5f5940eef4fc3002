"""Regional compilation: the loss of the model, from one code for all layers."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch._dynamo.utils import counters

import utils.training.compiler as compiler
from model import LanguageModel
from utils.config.settings import ModelConfig
from utils.training.compiler import compiled_loss, compiler_options

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
