"""How much host memory does rank 0 need to export a model in shards, beyond what it already uses?

torchrun --standalone --nproc-per-node 2 -m benchmarks.export_memory

The model has random weights. The peak of the process's memory during the export, minus its memory before, is compared
with the largest tensor.
"""

from __future__ import annotations

import ctypes
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

import psutil
import torch

from tokenizer import build_tokenizer
from utils.checkpoints.tensors import stream_order
from utils.config.settings import DataConfig, ModelConfig
from utils.inference.export import outlines_of, stream_export
from utils.machine.process_ranks import ProcessRanks
from utils.profiling.memory import reset_peak
from utils.terminal.cli import Parser, script
from utils.training.sharding import sharded_model

MODEL = ModelConfig(n_layer=6, n_head=8, n_embd=512, block_size=64, dropout=0.0)
CPU = torch.device("cpu")


def peak_bytes() -> int:
    """The most memory that this process has had since `reset_peak`."""
    lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith("VmHWM"))


@script
def main(argv: Sequence[str]) -> int:
    parser = Parser(prog="python -m benchmarks.export_memory", description=__doc__)
    parser.add_argument("--vocabulary", type=int, default=50_000, help="tokens of the vocabulary (default: 50000)")
    args = parser.parse(argv)
    ranks = ProcessRanks()
    tokenizer = build_tokenizer(DataConfig(tokenizer="byte"), ())
    model, shards = sharded_model(MODEL, args.vocabulary, CPU, torch.float32, ranks)
    outlines = outlines_of(model)
    if ranks.rank:
        for name in stream_order(outlines):
            for _ in shards.pieces(name, shards.own[name]):
                pass
        ranks.leave()
        return 0
    with tempfile.TemporaryDirectory() as folder:
        ctypes.CDLL(None).malloc_trim(0)  # otherwise the export would use kept, freed memory without its being counted
        before = psutil.Process().memory_info().rss
        reset_peak(CPU)
        stream_export(
            Path(folder) / "trained", model, tokenizer, {}, lambda name: shards.pieces(name, shards.own[name])
        )
        more = peak_bytes() - before
    sizes = [shape.numel() * dtype.itemsize for dtype, shape in outlines.values()]
    print(
        f"{ranks.world_size} ranks: weights {sum(sizes) / 1e6:.0f} MB, largest tensor {max(sizes) / 1e6:.0f} MB; "
        f"the export needs {more / 1e6:.0f} MB more, {more / max(sizes):.2f} of the largest tensor"
    )
    ranks.end(0)
    return 0


if __name__ == "__main__":
    sys.exit(main())
