"""peft opens our adapters, and gives the same logits and, in training, the same losses."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import train
from data import load_corpus
from model import LanguageModel
from tests.formats.conftest import make_model
from tests.tiny_export import char_tokenizer
from utils.config.settings import Config, DataConfig, ModelConfig, OptimizerConfig, TrainConfig
from utils.formats.adapter import target_modules, write_adapter
from utils.formats.huggingface import export_huggingface
from utils.formats.source import Source
from utils.inference.export import load_export
from utils.nn.lora import adapted_layers, add_adapters, merged_weights
from utils.optim.schedules import apply_schedules, learning_rate_at
from utils.terminal.console import Terminal
from utils.training.state import TrainState, build_state
from utils.training.step import clip_gradients, forward_backward, optimizer_step


def heavy(test: Any) -> Any:
    """Mark a test that imports peft and transformers as slow."""
    return pytest.mark.slow(pytest.mark.xdist_group("transformers")(test))


VOCABULARY = char_tokenizer(chr(0x4E00 + place) for place in range(50))
GPT2: dict[str, Any] = {"position": "learned", "mlp": "gelu_tanh"}
LLAMA: dict[str, Any] = {"position": "rope", "mlp": "swiglu", "norm": "rmsnorm", "bias": False, "n_kv_head": 2}
QWEN2: dict[str, Any] = {**LLAMA, "qkv_bias": True}
OURS: dict[str, Any] = {
    "position": "rope",
    "mlp": "relu2",
    "logit_softcap": 5.0,
}  # no family can hold it
SIZES: dict[str, Any] = {"n_layer": 2, "n_head": 4, "n_embd": 32, "block_size": 16}


def adapted(shape: dict[str, Any], settings: OptimizerConfig) -> LanguageModel:
    """A small model whose adapters have random weights."""
    torch.manual_seed(0)
    config = ModelConfig(**SIZES, **shape)
    model = LanguageModel(config, 50).eval()
    add_adapters(model, config, settings)
    for layer in adapted_layers(model).values():
        torch.nn.init.normal_(layer.lora_b, std=0.3)
    return model


def base_of(model: LanguageModel) -> LanguageModel:
    base = LanguageModel(model.config, model.vocab_size).eval()
    base.load_state_dict({name: weight for name, weight in model.state_dict().items() if "lora_" not in name})
    return base


def in_transformers(model: LanguageModel, folder: Path) -> Any:
    """The base of a model, opened by transformers."""
    from transformers import AutoModelForCausalLM

    export_huggingface(Source("base", base_of(model), VOCABULARY), folder)
    return AutoModelForCausalLM.from_pretrained(folder)


@pytest.mark.parametrize(
    ("shape", "targets", "expected"),
    [
        (GPT2, (), ["attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj"]),
        (GPT2, ("attention.proj", "qkv"), ["attn.c_attn", "attn.c_proj"]),
        (GPT2, ("blocks.1.mlp.up",), ["transformer.h.1.mlp.c_fc"]),
        (LLAMA, ("qkv",), ["self_attn.k_proj", "self_attn.q_proj", "self_attn.v_proj"]),
        (
            {**LLAMA, "tie_embeddings": False},
            ("mlp.proj", "gate", "head"),
            ["lm_head", "mlp.down_proj", "mlp.gate_proj"],
        ),
        (OURS, ("qkv", "up"), ["attention.qkv", "mlp.up"]),
    ],
)
def test_layers_have_the_names_of_the_family(
    shape: dict[str, Any], targets: tuple[str, ...], expected: list[str], tmp_path: Path
) -> None:
    settings = OptimizerConfig(lora_rank=3, lora_targets=targets)
    write_adapter(
        tmp_path / "adapter", adapted(shape, settings), settings, {"name": "someone/model", "revision": "abc"}
    )
    config = json.loads((tmp_path / "adapter/adapter_config.json").read_text(encoding="utf-8"))
    assert config["target_modules"] == expected
    assert (config["r"], config["lora_alpha"], config["base_model_name_or_path"]) == (3, 6, "someone/model")
    assert config["fan_in_fan_out"] == (shape is GPT2)
    tensors = load_file(tmp_path / "adapter/adapter_model.safetensors")
    assert all(name.startswith("base_model.model.") for name in tensors)
    for name, tensor in tensors.items():
        if name.endswith(".lora_A.weight"):
            assert tensor.size(0) == (9 if shape is OURS and "qkv" in name else 3)


def test_targets_are_full_names_if_a_suffix_would_match_more_layers() -> None:
    layers = {f"model.layers.{n}.mlp.{part}" for n in range(2) for part in ("up_proj", "gate_proj")}
    assert target_modules([f"model.layers.{n}.mlp.up_proj" for n in range(2)], layers) == ["mlp.up_proj"]
    assert target_modules(["model.layers.1.mlp.up_proj"], layers) == ["model.layers.1.mlp.up_proj"]


@heavy
@pytest.mark.parametrize("shape", [GPT2, LLAMA, QWEN2, OURS], ids=["gpt2", "llama", "qwen2", "ours"])
def test_peft_opens_an_adapter_and_gives_its_logits(shape: dict[str, Any], tmp_path: Path) -> None:
    import peft

    settings = OptimizerConfig(lora_rank=3, lora_alpha=5.0, lora_dropout=0.1)
    model = adapted(shape, settings)
    write_adapter(tmp_path / "adapter", model, settings)
    base = base_of(model) if shape is OURS else in_transformers(model, tmp_path / "base")
    theirs = peft.PeftModel.from_pretrained(base, tmp_path / "adapter").eval()
    idx = torch.randint(50, (2, 16))
    with torch.no_grad():
        found = theirs(idx)[0] if shape is OURS else theirs(idx).logits
        expected = model(idx)[0]
        assert torch.allclose(found, expected, rtol=0, atol=1e-5)
        assert not torch.allclose(base_of(model)(idx)[0], expected, atol=0.05)
        if shape is not OURS:  # peft's merging expects the configuration to be a dictionary
            ours = base_of(model)
            ours.load_state_dict(merged_weights(model))
            assert torch.allclose(theirs.merge_and_unload()(idx).logits, ours(idx)[0], rtol=0, atol=1e-5)


@heavy
@pytest.mark.parametrize("shape", [GPT2, LLAMA], ids=["gpt2", "llama"])
def test_fifty_steps_have_the_losses_of_the_same_loop_with_peft(
    shape: dict[str, Any], tmp_path: Path, tiny_corpus: Path
) -> None:
    """Within 1e-5 nats at each step: the same operations in another order."""
    import peft

    config = Config(
        data=DataConfig(dataset=str(tiny_corpus)),
        model=ModelConfig(**SIZES, **shape),
        optimizer=OptimizerConfig(lora_rank=4, lora_alpha=8.0, learning_rate=0.01),
        train=TrainConfig(batch_size=8, max_iters=50),
    )
    torch.manual_seed(0)
    corpus = load_corpus(config.data, config.model.block_size, tmp_path / "corpora")
    state = build_state(config, 50, corpus, torch.device("cpu"), torch.float32, Terminal(quiet=True))
    export_huggingface(Source("base", base_of(state.model), corpus.tokenizer), tmp_path / "base")
    write_adapter(tmp_path / "adapter", state.model, config.optimizer)
    theirs = losses_of_peft(peft, tmp_path, state)
    state.model.train()
    ours: list[float] = []
    for step in range(50):
        apply_schedules(state.optimizer, step, config.optimizer, 50)
        ours.append(forward_backward(state).item())
        clip_gradients(state)
        optimizer_step(state)
    assert ours == pytest.approx(theirs, abs=1e-5)
    assert ours[-1] < ours[0] - 0.3


def losses_of_peft(peft: Any, folder: Path, state: TrainState) -> list[float]:
    """The losses of 50 updates of the adapter in `folder`, made with peft, transformers and torch only."""
    from transformers import AutoModelForCausalLM

    base = AutoModelForCausalLM.from_pretrained(folder / "base")
    model = peft.PeftModel.from_pretrained(base, folder / "adapter", is_trainable=True)
    settings = state.config.optimizer
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(
        trained, betas=(settings.beta1, settings.beta2), eps=settings.adam_eps, weight_decay=settings.weight_decay
    )
    losses = []
    for step in range(50):
        optimizer.param_groups[0]["lr"] = learning_rate_at(step, settings, 50)
        inputs, targets = state.sampler.train_batch(step)
        loss = torch.nn.functional.cross_entropy(model(inputs).logits.flatten(0, 1), targets.flatten())
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, settings.grad_clip)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


@heavy
def test_peft_opens_the_adapters_of_a_fine_tuned_published_model(tmp_path: Path, tiny_corpus: Path) -> None:
    import peft
    from transformers import AutoModelForCausalLM

    text = tiny_corpus.read_text(encoding="utf-8")
    folder = tmp_path / "published"
    make_model("qwen 3", vocab_size=90).save_pretrained(folder)
    (folder / "tokenizer.json").write_text(char_tokenizer(sorted(set(text))).huggingface(), encoding="utf-8")
    places = ("--dataset", str(tiny_corpus), "--corpora-dir", str(tmp_path / "c"), "--runs-dir", str(tmp_path / "runs"))
    settings = ("--lora-rank", "3", "--learning-rate", "0.02", "--max-iters", "10", "--eval-iters", "2")
    words = ("--init-from", f"hf:{folder}", *places, *settings, "--no-aim-logging", "--threads", "1", "--device", "cpu")
    assert train.main([*words, "--batch-size", "4", "--sample-tokens", "0"]) == 0
    (run,) = (tmp_path / "runs").iterdir()
    adapter = run / "artifacts/export/adapter"
    config = json.loads((adapter / "adapter_config.json").read_text(encoding="utf-8"))
    assert config["base_model_name_or_path"] == "published"
    assert len(config["target_modules"]) == 7
    base = AutoModelForCausalLM.from_pretrained(folder)
    export = load_export(run / "artifacts/export", torch.device("cpu")).model
    idx = torch.randint(90, (2, 16))
    with torch.no_grad():
        before = base(idx).logits
        theirs = peft.PeftModel.from_pretrained(base, adapter).eval()
        assert torch.allclose(theirs(idx).logits, export(idx)[0], rtol=0, atol=1e-4)
        assert not torch.allclose(before, export(idx)[0], atol=0.01)
