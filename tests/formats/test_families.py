"""Imports from and exports to transformers keep the logits, and imports exported again keep the bytes of weights."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from model import LanguageModel
from tests.formats.conftest import LLAMA_LIKE, MODELS
from tests.tiny_export import TOKENIZER, char_tokenizer, tiny_model
from utils.config.settings import ModelConfig
from utils.formats.families import FAMILIES, family_for
from utils.formats.huggingface import export_huggingface
from utils.formats.pretrained import open_pretrained
from utils.formats.source import Source
from utils.inference.decode import decode_one_token, new_cache, prefill

pytestmark = [pytest.mark.slow, pytest.mark.xdist_group("transformers")]  # which these tests import
CPU = torch.device("cpu")
Foreign = Callable[[str], tuple[Path, Any]]
OTHER_TOKENIZER = char_tokenizer(chr(0x4E00 + place) for place in range(101))
every_model = pytest.mark.parametrize("name", MODELS)


def ids(model: LanguageModel, batch: int = 2) -> torch.Tensor:
    shape = (batch, model.config.block_size)
    return torch.randint(model.vocab_size, shape, generator=torch.Generator().manual_seed(0))


@every_model
@torch.no_grad()
def test_an_imported_model_gives_the_logits_of_transformers(name: str, foreign_folder: Foreign) -> None:
    folder, theirs = foreign_folder(name)
    ours = open_pretrained(folder).load(CPU, torch.float32)
    idx = ids(ours)
    expected = theirs(idx).logits
    torch.testing.assert_close(ours(idx)[0], expected, atol=1e-4, rtol=0)
    cache = new_cache(ours, 2)
    logits = [prefill(ours, idx[:, :3], cache)]
    logits += [decode_one_token(ours, idx[:, place], cache) for place in range(3, idx.size(1))]
    torch.testing.assert_close(torch.stack(logits, dim=1), expected[:, 2:], atol=1e-4, rtol=0)


@every_model
@torch.no_grad()
def test_an_imported_model_is_exported_with_the_same_bytes(name: str, foreign_folder: Foreign, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    folder, theirs = foreign_folder(name)
    opened = open_pretrained(folder)
    ours = opened.load(CPU, torch.float32)
    source = Source("imported", ours, OTHER_TOKENIZER, pretrained=opened.facts())
    out = tmp_path / "out"
    written = export_huggingface(source, out, shard_bytes=40_000)
    assert written["architecture"] == type(theirs).__name__
    again = open_pretrained(out)
    assert {found.theirs for found in again.places} == {found.theirs for found in opened.places}
    for place in opened.places:
        before, after = opened.get(place.theirs), again.get(place.theirs)
        assert before.dtype == after.dtype
        assert torch.equal(before.view(torch.uint8), after.view(torch.uint8))
    model = AutoModelForCausalLM.from_pretrained(out)
    assert type(model) is type(theirs)
    idx = ids(ours)
    torch.testing.assert_close(model(idx).logits, theirs(idx).logits, atol=1e-5, rtol=0)


OURS: dict[str, tuple[str, dict[str, Any]]] = {
    "default": ("GPT2LMHeadModel", {"position": "learned"}),
    "no biases": ("GPT2LMHeadModel", {"position": "learned", "bias": False, "mlp": "relu2", "tie_embeddings": False}),
    "no qkv bias": ("GPT2LMHeadModel", {"position": "learned", "qkv_bias": False, "mlp": "gelu_tanh", "ffn_dim": 24}),
    "llama": ("LlamaForCausalLM", LLAMA_LIKE | {"n_kv_head": 1, "tie_embeddings": False}),
    "llama, biases": ("LlamaForCausalLM", LLAMA_LIKE | {"bias": True, "head_dim": 6}),
    "window": ("MistralForCausalLM", LLAMA_LIKE | {"sliding_window": 3}),
    "q, k, v biases": ("LlamaForCausalLM", LLAMA_LIKE | {"qkv_bias": True}),
    "plain qk norm": ("Qwen3ForCausalLM", LLAMA_LIKE | {"qk_norm": True, "head_dim": 12, "rope_theta": 50.0}),
    "qk norm, later window": (
        "Qwen3ForCausalLM",
        LLAMA_LIKE | {"qk_norm": True, "qk_norm_weights": True, "sliding_window": 4, "full_attention_layers": 1},
    ),
}


@pytest.mark.parametrize("kind", OURS)
@torch.no_grad()
def test_our_models_give_the_same_logits_in_transformers(kind: str, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    architecture, settings = OURS[kind]
    ours = tiny_model(**settings)
    assert export_huggingface(Source("ours", ours, TOKENIZER), tmp_path / "out")["architecture"] == architecture
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    idx = ids(ours)
    torch.testing.assert_close(theirs(idx).logits, ours(idx)[0], atol=1e-4, rtol=0)


def test_each_architecture_is_registered_under_its_name() -> None:
    assert list(FAMILIES) == [family.architecture for family in FAMILIES.values()]
    assert family_for(ModelConfig(**LLAMA_LIKE), "MistralForCausalLM").architecture == "MistralForCausalLM"
    assert family_for(ModelConfig(**LLAMA_LIKE)).architecture == "LlamaForCausalLM"
