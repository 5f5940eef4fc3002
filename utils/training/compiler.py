"""torch.compile for training: the block once for all layers, the part before the blocks, and the part after them.

However deep the model is, one block is compiled, which takes a fraction of the time of compiling the whole model
[PyTorch tutorials, "Reducing torch.compile cold start compilation time with regional compilation"] and loses nothing
that matters, because only the residual stream passes from block to block.
"""

from __future__ import annotations

import contextlib
import functools
import os
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from model import LanguageModel, run_block
from utils.nn.activation_checkpointing import recomputed
from utils.nn.cross_entropy import rows_at_once
from utils.nn.linear import product_dtype

Loss = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]  # inputs and targets, (B, T) each -> ()

# The compiler's own CUDA graphs stay off: utils/training/step_graph.py records whole steps.
MODES = {"default": "default", "reduce-overhead": "default", "max-autotune": "max-autotune-no-cudagraphs"}

FASTER_ON_CUDA = {  # docs/LOG.md has the times
    # torch's dropout kernel makes four random numbers per call of Philox, inductor's makes one.
    "fallback_random": True,
    # With dropout, one kernel for the gradients of a norm's input and weight is slower than two. Since torch 2.10.
    "triton.mix_order_reduction": False,
}


def compiled_loss(model: LanguageModel, device: torch.device, mode: str, tokens: int) -> Loss:
    """`model.loss`, compiled in three parts, or as a whole if the model overrides its forward pass.

    The code is cached in `cache_folder`, or TORCHINDUCTOR_CACHE_DIR, where a later start with the same shapes finds it.

    Args:
        mode: the setting compile_mode.
        tokens: tokens per micro-step.
    """
    begin_compiler(device)
    if (hashing := hash_triton()) is not None:
        hashing.join()
    options = compiler_options(device, mode)
    parts = (LanguageModel.forward, LanguageModel.loss, LanguageModel.hidden, LanguageModel.embed)
    if any(getattr(type(model), part.__name__) is not part for part in parts):
        return torch.compile(model.loss, dynamic=False, **options)
    embed: Callable[..., Any] = torch.compile(model.embed, dynamic=False, **options)
    block: Callable[..., torch.Tensor] = torch.compile(run_block, dynamic=False, **options)
    if model.recomputes:
        block = recomputed(block, model.config.dropout)
    in_chunks = rows_at_once(device, tokens, model.vocab_size)  # the loop over the chunks is not compiled
    end: Callable[..., torch.Tensor] = torch.compile(_final_norm if in_chunks else _head, dynamic=False, **options)

    def loss(idx: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        documents = model.documents(idx)
        x, rope = embed(idx, documents)
        for layer in model.blocks:
            x = block(layer, x, rope, documents)
        return model.head_loss(end(model, x), targets) if in_chunks else end(model, x, targets)

    return loss


def begin_compiler(device: torch.device) -> None:
    """Begin the work that torch.compile needs once per process and without a model, in parallel with other work.

    On CUDA this includes starting the processes that compile kernels; the compiler itself would start them only after
    its first trace.
    """
    if (cache := cache_folder()) is not None:
        os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(cache))  # read when the compiler is first used
    hash_triton()
    if device.type == "cuda":
        with contextlib.suppress(Exception):  # another version of torch, or no Triton: reported when it compiles
            from torch._inductor.async_compile import AsyncCompile

            AsyncCompile.wakeup()


def cache_folder() -> Path | None:
    """The folder of compiled code; None if the user has no home folder, as in some containers."""
    try:
        caches = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    except RuntimeError:
        return None
    return caches / "workbench" / "compiled"


@functools.cache
def hash_triton() -> threading.Thread | None:
    """Start a thread in which Triton hashes its own libraries, half a gigabyte, for the compiler; None without Triton.

    Each process needs the hash. The thread must end before the compiler asks for it, or they are hashed twice.
    """
    try:
        from triton.runtime.cache import triton_key
    except Exception:  # not installed, another version, or broken: reported when it compiles
        return None

    def run() -> None:
        with contextlib.suppress(Exception):
            triton_key()

    thread = threading.Thread(target=run, name="triton_key", daemon=True)
    thread.start()
    return thread


def compiler_options(device: torch.device, mode: str) -> dict[str, Any]:
    """Arguments of torch.compile."""
    if device.type == "mps":
        return {"backend": "aot_eager"}
    if device.type != "cuda":
        return {"mode": MODES[mode]}
    options = {**torch._inductor.list_mode_options(MODES[mode]), **FASTER_ON_CUDA}
    return {"options": {name: value for name, value in options.items() if name in torch._inductor.list_options()}}


def _final_norm(model: LanguageModel, x: torch.Tensor) -> torch.Tensor:
    x = model.final_norm(x)
    return x.to(product_dtype(x))


def _head(model: LanguageModel, x: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    return model.head_loss(model.final_norm(x), targets)
