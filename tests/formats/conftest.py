"""Random models of transformers, made once: importing the library takes seconds."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.tiny_export import lively

os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
SIZES = {
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "hidden_size": 32,
    "intermediate_size": 48,
    "max_position_embeddings": 40,
    "vocab_size": 101,
    "bos_token_id": None,
    "eos_token_id": None,
}
GPT2_SIZES = {
    "n_layer": 2,
    "n_head": 4,
    "n_embd": 32,
    "n_positions": 40,
    "vocab_size": 101,
    "bos_token_id": None,
    "eos_token_id": None,
}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 500.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}
YARN = {"rope_type": "yarn", "rope_theta": 1000.0, "factor": 4.0, "original_max_position_embeddings": 16}
LINEAR = {"rope_type": "linear", "rope_theta": 1000.0, "factor": 4.0}
# settings of ours that llama's family can hold
LLAMA_LIKE: dict[str, Any] = {"position": "rope", "norm": "rmsnorm", "mlp": "swiglu", "bias": False}
# name -> class of transformers, settings of its configuration
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "gpt2": ("GPT2", GPT2_SIZES),
    "gpt2, untied, relu2": (
        "GPT2",
        {**GPT2_SIZES, "tie_word_embeddings": False, "activation_function": "relu2", "n_inner": 40},
    ),
    "llama": ("Llama", SIZES),
    "llama, one key head": ("Llama", {**SIZES, "num_key_value_heads": 1, "head_dim": 12}),
    "smollm: tied": ("Llama", {**SIZES, "tie_word_embeddings": True, "num_key_value_heads": 4, "rms_norm_eps": 1e-3}),
    "llama 3, biases of attention": ("Llama", {**SIZES, "attention_bias": True, "rope_parameters": LLAMA3}),
    "llama, all biases": ("Llama", {**SIZES, "attention_bias": True, "mlp_bias": True}),
    "llama, biases of the mlp": ("Llama", {**SIZES, "mlp_bias": True}),
    "mistral, window": ("Mistral", {**SIZES, "sliding_window": 5}),
    "mistral, no window": ("Mistral", {**SIZES, "sliding_window": None, "head_dim": 12}),
    "qwen 2, later window": (
        "Qwen2",
        {**SIZES, "use_sliding_window": True, "sliding_window": 6, "max_window_layers": 1},
    ),
    "qwen 2.5, yarn": ("Qwen2", {**SIZES, "rope_parameters": YARN, "tie_word_embeddings": True}),
    "qwen 3": ("Qwen3", {**SIZES, "head_dim": 16, "tie_word_embeddings": True}),
    "qwen 3, biases, linear": ("Qwen3", {**SIZES, "head_dim": 8, "attention_bias": True, "rope_parameters": LINEAR}),
}


def make_model(name: str, **settings: Any) -> Any:
    """A model of transformers with random weights that are large enough for every part to matter."""
    import transformers

    kind, given = MODELS[name]
    config = getattr(transformers, f"{kind}Config")(**{**given, **settings})
    head = "LMHeadModel" if kind == "GPT2" else "ForCausalLM"
    torch.manual_seed(0)
    return lively(getattr(transformers, f"{kind}{head}")(config), 0.1)


@pytest.fixture(scope="session")
def foreign_folder(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], tuple[Path, Any]]:
    """Returns the folder and the model of a name in MODELS; each is made at its first use."""
    made: dict[str, tuple[Path, Any]] = {}

    def get(name: str) -> tuple[Path, Any]:
        if name not in made:
            folder = tmp_path_factory.mktemp("foreign") / "model"
            model = make_model(name)
            model.save_pretrained(folder, max_shard_size="30KB" if len(made) % 2 else "1GB")
            made[name] = folder, model
        return made[name]

    return get
