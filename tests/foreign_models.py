"""Models of other programs: writers of their file formats, and reference implementations of their logits.

python tests/foreign_models.py FOLDER TEXT     # writes a nanoGPT checkpoint whose tokens are the characters of TEXT
"""

from __future__ import annotations

import json
import struct
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

Tensors = dict[str, torch.Tensor]
L, H, C, T, V = 2, 4, 32, 16, 11  # layers, heads, channels, context, tokens


def random(*shape: int) -> torch.Tensor:
    return torch.randn(shape) * 0.2


def attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """(B, T, H, D) each -> (B, T, H D), causal, in plain operations."""
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    scores = q @ k.transpose(-2, -1) / q.size(-1) ** 0.5
    later = torch.ones(q.size(2), q.size(2), dtype=torch.bool).triu(1)
    return (scores.masked_fill(later, float("-inf")).softmax(-1) @ v).transpose(1, 2).flatten(2)


# -------------------------------------------------------------------------------------------------- nanoGPT, llm.c


def gpt2(bias: bool = True, vocab_size: int = V) -> Tensors:
    """The parameters of nanoGPT's GPT in the order of its modules."""
    torch.manual_seed(1)
    tensors = {"transformer.wte.weight": random(vocab_size, C), "transformer.wpe.weight": random(T, C)}

    def add(name: str, *shape: int) -> None:
        tensors[f"{name}.weight"] = random(*shape)
        if bias:
            tensors[f"{name}.bias"] = random(shape[0])

    for layer in range(L):
        h = f"transformer.h.{layer}"
        add(f"{h}.ln_1", C)
        add(f"{h}.attn.c_attn", 3 * C, C)
        add(f"{h}.attn.c_proj", C, C)
        add(f"{h}.ln_2", C)
        add(f"{h}.mlp.c_fc", 4 * C, C)
        add(f"{h}.mlp.c_proj", C, 4 * C)
    add("transformer.ln_f", C)
    return tensors


def gpt2_logits(p: Tensors, idx: torch.Tensor, approximate: str = "none") -> torch.Tensor:
    def linear(x: torch.Tensor, name: str) -> torch.Tensor:
        return F.linear(x, p[f"{name}.weight"], p.get(f"{name}.bias"))

    def norm(x: torch.Tensor, name: str) -> torch.Tensor:
        return F.layer_norm(x, (C,), p[f"{name}.weight"], p.get(f"{name}.bias"))

    x = p["transformer.wte.weight"][idx] + p["transformer.wpe.weight"][: idx.size(1)]
    for layer in range(L):
        h = f"transformer.h.{layer}"
        qkv = linear(norm(x, f"{h}.ln_1"), f"{h}.attn.c_attn").split(C, -1)
        q, k, v = (part.unflatten(-1, (H, C // H)) for part in qkv)
        x = x + linear(attention(q, k, v), f"{h}.attn.c_proj")
        hidden = F.gelu(linear(norm(x, f"{h}.ln_2"), f"{h}.mlp.c_fc"), approximate=approximate)
        x = x + linear(hidden, f"{h}.mlp.c_proj")
    return norm(x, "transformer.ln_f") @ p["transformer.wte.weight"].t()


def adamw_of(p: Tensors, weight_decay: float = 0.1) -> torch.optim.AdamW:
    """nanoGPT's optimizer: weight decay for parameters of two or more dimensions."""
    groups = [
        {"params": [x for x in p.values() if x.dim() > 1], "weight_decay": weight_decay},
        {"params": [x for x in p.values() if x.dim() < 2], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=1e-3, betas=(0.9, 0.99))


NANOGPT_CONFIG = {
    **{"out_dir": "out", "eval_interval": 5, "log_interval": 1, "eval_iters": 2, "eval_only": False},
    **{"always_save_checkpoint": True, "init_from": "scratch", "wandb_log": False, "wandb_project": "owt"},
    **{"wandb_run_name": "gpt2", "dataset": "letters", "gradient_accumulation_steps": 2, "batch_size": 3},
    **{"block_size": T, "n_layer": L, "n_head": H, "n_embd": C, "dropout": 0.0, "bias": True},
    **{"learning_rate": 1e-3, "max_iters": 9, "weight_decay": 0.1, "beta1": 0.9, "beta2": 0.99, "grad_clip": 1.0},
    **{"decay_lr": True, "warmup_iters": 2, "lr_decay_iters": 9, "min_lr": 1e-4, "backend": "nccl"},
    **{"device": "cuda", "dtype": "bfloat16", "compile": True},
}


def nanogpt_checkpoint(
    p: Tensors, optimizer: torch.optim.AdamW | None, step: int, config: dict[str, Any] | None = None
) -> dict[str, Any]:
    config = config or NANOGPT_CONFIG
    keys = ("n_layer", "n_head", "n_embd", "block_size", "bias", "dropout")
    embedding = p["transformer.wte.weight"].detach()
    return {
        "model": {**{name: tensor.detach() for name, tensor in p.items()}, "lm_head.weight": embedding},
        "optimizer": optimizer.state_dict() if optimizer else None,
        "model_args": {**{key: config[key] for key in keys}, "vocab_size": len(embedding)},
        "iter_num": step,
        "best_val_loss": torch.tensor(1.5),
        "config": config,
    }


def write_nanogpt(folder: Path, text: Path, step: int = 5) -> None:
    p = {name: x.requires_grad_() for name, x in gpt2(vocab_size=len(set(text.read_text(encoding="utf-8")))).items()}
    optimizer = adamw_of(p)
    for parameter in p.values():
        parameter.grad = torch.ones_like(parameter)
    for _ in range(step):
        optimizer.step()
    folder.mkdir()
    torch.save(nanogpt_checkpoint(p, optimizer, step), folder / "ckpt.pt")


GPT2_TENSORS = (
    *("ln_1.weight", "ln_1.bias", "attn.c_attn.weight", "attn.c_attn.bias", "attn.c_proj.weight", "attn.c_proj.bias"),
    *("ln_2.weight", "ln_2.bias", "mlp.c_fc.weight", "mlp.c_fc.bias", "mlp.c_proj.weight", "mlp.c_proj.bias"),
)


def raw(tensor: torch.Tensor) -> bytes:
    return tensor.detach().contiguous().view(torch.uint8).numpy().tobytes()


def llm_c_numbers(p: Tensors, padding: int, dtype: torch.dtype) -> Iterator[bytes]:
    """The bytes of all tensors in llm.c's order: each kind of tensor for all layers."""
    yield raw(F.pad(p["transformer.wte.weight"], (0, 0, 0, padding)).to(dtype))
    yield raw(p["transformer.wpe.weight"].to(dtype))
    for kind in GPT2_TENSORS:
        for layer in range(L):
            yield raw(p[f"transformer.h.{layer}.{kind}"].to(dtype))
    yield raw(p["transformer.ln_f.weight"].to(dtype))
    yield raw(p["transformer.ln_f.bias"].to(dtype))


def write_llm_c(path: Path, p: Tensors, version: int = 3, padding: int = 5) -> None:
    vocab_size = len(p["transformer.wte.weight"])
    header = [20240326, version, T, vocab_size, L, H, C, vocab_size + padding]
    dtype = {3: torch.float32, 5: torch.bfloat16}[version]
    with path.open("wb") as file:
        file.write(struct.pack("<256i", *header, *[0] * 248))
        file.writelines(llm_c_numbers(p, padding, dtype))


def write_llm_c_state(path: Path, step: int, *kinds: Tensors, padding: int = 5, processes: int = 1) -> None:
    """kinds: m, v and perhaps the weights in float32."""
    header = [0] * 256
    header[:5] = [20240527, 1, processes, 0, int(len(kinds) == 3)]
    header[10] = step
    with path.open("wb") as file:
        file.write(struct.pack("<256i", *header))
        for kind in kinds:
            file.writelines(llm_c_numbers(kind, padding, torch.float32))


# -------------------------------------------------------------------------------------------------------- llama2.c

F_DIM, K = 48, 2  # hidden width, key/value heads
LLAMA_KINDS = {
    **{"attention_norm": (C,), "wq": (C, C), "wk": (K * C // H, C), "wv": (K * C // H, C), "wo": (C, C)},
    **{"ffn_norm": (C,), "w1": (F_DIM, C), "w2": (C, F_DIM), "w3": (F_DIM, C)},
}


def llama(tied: bool = True) -> Tensors:
    torch.manual_seed(2)
    tensors = {"tok_embeddings": random(V, C), "norm": random(C)}
    tensors |= {f"{layer}.{kind}": random(*shape) for layer in range(L) for kind, shape in LLAMA_KINDS.items()}
    return tensors if tied else {**tensors, "output": random(V, C)}


def llama_logits(p: Tensors, idx: torch.Tensor) -> torch.Tensor:
    D = C // H
    angles = torch.outer(torch.arange(idx.size(1)).float(), 10000.0 ** -(torch.arange(0, D, 2).float() / D))
    turn = torch.polar(torch.ones_like(angles), angles)[:, None]  # (T, 1, D / 2)

    def norm(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-5) * weight

    def rotated(x: torch.Tensor) -> torch.Tensor:  # channels 2 i and 2 i + 1 are a complex number
        return torch.view_as_real(torch.view_as_complex(x.unflatten(-1, (D // 2, 2)).contiguous()) * turn).flatten(-2)

    x = p["tok_embeddings"][idx]
    for layer in range(L):
        of = {kind: p[f"{layer}.{kind}"] for kind in LLAMA_KINDS}
        hidden = norm(x, of["attention_norm"])
        q, k, v = ((hidden @ of[kind].t()).unflatten(-1, (-1, D)) for kind in ("wq", "wk", "wv"))
        q, k = rotated(q), rotated(k)
        k, v = (part.repeat_interleave(H // K, dim=2) for part in (k, v))
        x = x + attention(q, k, v) @ of["wo"].t()
        hidden = norm(x, of["ffn_norm"])
        x = x + (F.silu(hidden @ of["w1"].t()) * (hidden @ of["w3"].t())) @ of["w2"].t()
    return norm(x, p["norm"]) @ p.get("output", p["tok_embeddings"]).t()


def write_llama2_c(path: Path, p: Tensors, version: int) -> None:
    tied = "output" not in p
    sizes = [C, F_DIM, L, H, K, V, T]
    attention_kinds, mlp = ("wq", "wk", "wv", "wo"), ("w1", "w2", "w3")
    if version == 0:
        sizes[5] = V if tied else -V
        start = struct.pack("<7i", *sizes)
        order = ["tok_embeddings", "attention_norm", *attention_kinds, "ffn_norm", *mlp, "norm", "freqs", "output"]
    else:
        start = (struct.pack("<2i7iB", 0x616B3432, version, *sizes, tied)).ljust(256, b"\0")
        order = ["attention_norm", "ffn_norm", "norm", "tok_embeddings", *attention_kinds, *mlp, "output"]
    with path.open("wb") as file:
        file.write(start)
        for name in order:
            if name == "freqs":
                file.write(bytes(4 * T * C // H))
            elif name in LLAMA_KINDS:
                file.writelines(raw(p[f"{layer}.{name}"]) for layer in range(L))
            elif name in p:
                file.write(raw(p[name]))


PIECES = ("<unk>", "\n<s>\n", "\n</s>\n", "<0x0A>", " ", "a", "b", "c", "ab", " a", " ab")  # U+2581 written as a space


def write_llama2_c_tokenizer(path: Path) -> None:
    with path.open("wb") as file:
        file.write(struct.pack("<I", max(map(len, PIECES))))
        for number, piece in enumerate(PIECES):
            file.write(struct.pack("<fI", -float(number), len(piece.encode())) + piece.encode())


# ------------------------------------------------------------------------------------------------------------ MyPT


def mypt(tied: bool = False) -> Tensors:
    """MyPT's GPT with learned positions: biases everywhere except in the attention's projections."""
    torch.manual_seed(3)
    tensors = {"token_embedding_table.weight": random(V, C), "position_embedding_table.weight": random(T, C)}
    for layer in range(L):
        b = f"blocks.{layer}"
        tensors |= {f"{b}.sa.qkv.weight": random(3 * C, C), f"{b}.sa.proj.weight": random(C, C)}
        tensors |= {f"{b}.fwd.net.0.weight": random(4 * C, C), f"{b}.fwd.net.0.bias": random(4 * C)}
        tensors |= {f"{b}.fwd.net.2.weight": random(C, 4 * C), f"{b}.fwd.net.2.bias": random(C)}
        tensors |= {f"{b}.{norm}.{kind}": random(C) for norm in ("ln1", "ln2") for kind in ("weight", "bias")}
    tensors |= {"ln_f.weight": random(C), "ln_f.bias": random(C)}
    head = tensors["token_embedding_table.weight"] if tied else random(V, C)
    return {**tensors, "lm_head.weight": head, "lm_head.bias": random(V)}


def mypt_logits(p: Tensors, idx: torch.Tensor) -> torch.Tensor:
    def norm(x: torch.Tensor, name: str) -> torch.Tensor:
        return F.layer_norm(x, (C,), p[f"{name}.weight"], p[f"{name}.bias"])

    x = p["token_embedding_table.weight"][idx] + p["position_embedding_table.weight"][: idx.size(1)]
    for layer in range(L):
        b = f"blocks.{layer}"
        qkv = (norm(x, f"{b}.ln1") @ p[f"{b}.sa.qkv.weight"].t()).split(C, -1)
        x = x + attention(*(part.unflatten(-1, (H, C // H)) for part in qkv)) @ p[f"{b}.sa.proj.weight"].t()
        hidden = F.gelu(F.linear(norm(x, f"{b}.ln2"), p[f"{b}.fwd.net.0.weight"], p[f"{b}.fwd.net.0.bias"]))
        x = x + F.linear(hidden, p[f"{b}.fwd.net.2.weight"], p[f"{b}.fwd.net.2.bias"])
    return F.linear(norm(x, "ln_f"), p["lm_head.weight"], p["lm_head.bias"])


MYPT_CONFIG = {
    **{"batch_size": 4, "block_size": T, "vocab_size": V, "n_embd": C, "n_head": H, "n_layer": L, "dropout": 0.1},
    **{"bias": False, "use_checkpoint": False, "device": "cuda", "use_loss_mask": False, "tie_weights": False},
    **{"save_dtype": "fp32", "pos_encoding": "learned", "mlp_type": "gelu", "norm_type": "layernorm"},
    **{"rope_theta": 10000.0, "rope_scale": 1.0, "pad_token_id": None},
}


def write_mypt(folder: Path, p: Tensors, step: int = 7, optimizer: bool = True, **config: Any) -> None:
    folder.mkdir(exist_ok=True)
    torch.save({"state_dict": p, "checkpoint_dtype": "fp32", "model_dtype": "float32"}, folder / "model.pt")
    (folder / "config.json").write_text(json.dumps({**MYPT_CONFIG, **config}, indent=2))
    (folder / "tokenizer.json").write_text(json.dumps({"token_kind": "char", "chars": list("\n abcdefghi")}))
    state: dict[str, Any] = {"step": step, "training_config": {"learning_rate": 2e-4, "max_iters": 100}}
    if optimizer:
        kept = [n for n, x in p.items() if x.dim() == 1 or "embedding" in n or "ln" in n]
        groups = [[x for n, x in p.items() if n not in kept], [p[n] for n in kept]]
        adamw = torch.optim.AdamW([{"params": group} for group in groups], lr=1e-3, betas=(0.9, 0.95))
        for parameter in p.values():
            parameter.grad = torch.ones_like(parameter)
        for _ in range(step):
            adamw.step()
        torch.save(adamw.state_dict(), folder / "optimizer.pt")
        state["optimizer_file"] = "optimizer.pt"
        torch.save({"state_dict": p}, folder / "model.pt")
    (folder / "training_state.json").write_text(json.dumps(state))


if __name__ == "__main__":
    write_nanogpt(Path(sys.argv[1]), Path(sys.argv[2]))
