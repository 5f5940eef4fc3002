"""torch.compile for training: the block once for all layers, what precedes the blocks, and what follows them.

A block is compiled once however deep the model is, which takes a fraction of the time that the whole model does
[PyTorch tutorials, "Reducing torch.compile cold start compilation time with regional compilation"], and loses nothing
that matters: between two blocks there is only the residual stream.
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

# The recordings of utils/training/step_graph.py take the place of the compiler's own CUDA graphs.
MODES = {"default": "default", "reduce-overhead": "default", "max-autotune": "max-autotune-no-cudagraphs"}

FASTER_ON_CUDA = {  # docs/LOG.md has the times
    # torch's kernel for dropout makes four random numbers of one call of Philox, inductor's makes one.
    "fallback_random": True,
    # One kernel for the gradients of a norm's input and weight is slower than two, beside dropout. Since torch 2.10.
    "triton.mix_order_reduction": False,
}


def compiled_loss(model: LanguageModel, device: torch.device, mode: str, tokens: int) -> Loss:
    """`model.loss` of three compiled parts; of a model with a forward pass of its own, compiled as a whole.

    The code is kept in a folder (see `begin_compiler`): a second start of the same shape finds it there.

    Args:
        mode: setting compile_mode.
        tokens: of a micro-step.
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
    in_chunks = rows_at_once(device, tokens, model.vocab_size)  # their loop stays as it is
    end: Callable[..., torch.Tensor] = torch.compile(_final_norm if in_chunks else _head, dynamic=False, **options)

    def loss(idx: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        documents = model.documents(idx)
        x, rope = embed(idx, documents)
        for layer in model.blocks:
            x = block(layer, x, rope, documents)
        return model.head_loss(end(model, x), targets) if in_chunks else end(model, x, targets)

    return loss


def begin_compiler(device: torch.device) -> None:
    """Begin what torch.compile needs once a process and what needs no model, so that it goes on beside other work.

    On CUDA that includes the processes which compile kernels: by itself the compiler starts them after its first trace.
    Its code is kept in the user's cache, or in TORCHINDUCTOR_CACHE_DIR if that is set.
    """
    with contextlib.suppress(RuntimeError):  # a user without a home, as in a container
        cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "workbench" / "compiled"
        os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(cache))  # read when the compiler is first used
    hash_triton()
    if device.type == "cuda":
        with contextlib.suppress(Exception):  # another version of torch, or no Triton: whoever compiles will see
            from torch._inductor.async_compile import AsyncCompile

            AsyncCompile.wakeup()


@functools.cache
def hash_triton() -> threading.Thread | None:
    """A thread in which Triton hashes its own libraries, half a gigabyte; the compiler asks for the hash at each start.

    It must end before the compiler asks, which would otherwise hash them again. None where there is no Triton.
    """
    try:
        from triton.runtime.cache import triton_key
    except Exception:  # not installed, another version, or broken: whoever compiles will see
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
