"""What rank 0 sends to the other ranks of a run, and what all ranks agree on at each step."""

from __future__ import annotations

import signal
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from utils.checkpoints.files import Checkpoint, read_checkpoint
from utils.checkpoints.folder import MANIFEST_FILE
from utils.config.fields import SECTION_OF
from utils.errors import UserError, shown
from utils.machine.ranks import Ranks
from utils.machine.signals import StopRequest
from utils.runs.origin import Relation
from utils.training.setup import Setup
from utils.training.state import TrainState, capture, restore, start_from

CPU = torch.device("cpu")
NO_SIGNAL = 1000  # in place of a signal's number: the rank stops for another reason


def agree(stop: StopRequest, ranks: Ranks) -> bool:
    """Let all ranks stop, or rank 0 save, if any of them is asked to. All ranks call it at each step.

    Returns:
        Whether to stop; the same on all ranks. If a signal reaches a rank while it waits for the others here, they
        agree on it at the next step.
    """
    stop.save_due = stop.save
    if stop.save_due:  # a request that arrives from here on is kept for the next step
        stop.save = False
    if not ranks.several:
        return bool(stop)
    marks = torch.zeros(ranks.world_size, 2)
    if stop:
        marks[ranks.rank, 0] = stop.signum or NO_SIGNAL
    marks[ranks.rank, 1] = stop.save_due
    stops, saves = ranks.sum_exactly(marks).int().T.tolist()
    stop.save_due = any(saves)
    if not any(stops):
        return False
    # This happens once at most, since training ends. Not after a signal, because the store may be gone then.
    reasons = ranks.collect("reason", stop.reason or "") if NO_SIGNAL in stops else []
    rank = next(rank for rank, mark in enumerate(stops) if mark)  # rank 0 before others
    if stops[rank] != NO_SIGNAL:
        stop.signum_of_others = stops[rank]
        stop.stop(signal.Signals(stops[rank]).name)
    else:
        stop.stop(f"rank {rank}: {reasons[rank]}" if reasons else "another rank has a reason")
    return True


def check_same(facts: Sequence[Mapping[str, Any]]) -> None:
    """Raises UserError if the code or the settings of a rank are not those of rank 0.

    Args:
        facts: the facts of each rank (`launch_facts`), or `error`, the mistake that the rank has found.
    """
    own = facts[0]
    for rank, theirs in enumerate(facts):
        where = f"rank {rank} ({theirs.get('host', 'unknown host')})"
        if "error" in theirs:
            raise UserError(f"{where}: {theirs['error']}")
        for key in ("code", "torch"):
            if theirs[key] != own[key]:
                raise UserError(
                    f"{where} has another version of {'the code' if key == 'code' else 'torch'}: {theirs[key][:12]}, "
                    f"not {own[key][:12]}; all ranks need the same"
                )
        for key, value in own["settings"].items():
            if (other := theirs["settings"].get(key)) != value:
                what = "" if key in SECTION_OF else "--"
                raise UserError(f"{where}: {what}{key} is {shown(other)}, and {shown(value)} on rank 0")


def assign(setup: Setup) -> None:
    """Tell the other ranks what to train, and wait until each has found everything that it needs.

    Raises:
        UserError: a rank lacks the device, the corpus or a callback.
    """
    assignment = {
        "config": setup.config.model_dump(mode="json"),
        "max_iters": setup.max_iters,
        "tokenizer": setup.corpus.tokenizer.to_json(),
        "corpus_hash": setup.corpus.hash,
        "dtype": str(setup.dtype),
    }
    setup.ranks.seconds = setup.config.train.rank_timeout
    setup.ranks.share("assignment", assignment)
    for rank, mistake in enumerate(setup.ranks.collect("ready", "")):
        if mistake:
            raise UserError(f"rank {rank}: {mistake}")


def send_state(state: TrainState) -> None:
    """On rank 0: send the state that training starts from to the other ranks."""
    weights, optimizer, facts = capture(state)
    weights = state.model.state_dict()  # `capture` leaves out those that adapters keep frozen
    outlines = [{name: _outline(tensor) for name, tensor in tensors.items()} for tensors in (weights, optimizer)]
    state.ranks.share("state", {"facts": facts, "weights": outlines[0], "optimizer": outlines[1]})
    for tensor in (*weights.values(), *optimizer.values()):
        state.ranks.broadcast(tensor)


def receive_state(state: TrainState) -> None:
    """On another rank: continue from the state that rank 0 sends, as from a checkpoint."""
    sent = state.ranks.share("state", None)
    weights, optimizer = (
        {name: _from_outline(outline, state.device) for name, outline in sent[kind].items()}
        for kind in ("weights", "optimizer")
    )
    for tensor in (*weights.values(), *optimizer.values()):
        state.ranks.broadcast(tensor)
    facts = sent["facts"] | {"device": str(state.device)}
    restore(state, Checkpoint(Path("rank 0"), facts["step"], weights, optimizer, {}, facts))


# ------------------------------------------------------------------------------------------- models in shards


def announce_start(state: TrainState, checkpoint: Checkpoint | None, relation: Relation) -> Checkpoint | None:
    """On rank 0: tell the other ranks which checkpoint a sharded state starts from; return it for rank 0 to read.

    Each rank reads a run's checkpoint itself. Other weights are read by rank 0, which sends each tensor as it is read.
    """
    ranks = state.ranks
    if checkpoint is None or not ranks.several:
        ranks.share("start", {})
        return checkpoint
    if (checkpoint.path / MANIFEST_FILE).is_file():
        ranks.share("start", {"relation": relation, "path": str(checkpoint.path)})
        return checkpoint
    weights = _BroadcastTensors(
        ranks, {name: _outline(tensor) for name, tensor in checkpoint.weights.items()}, checkpoint.weights
    )
    ranks.share("start", {"relation": relation, "outlines": weights.outlines, "state": checkpoint.state})
    return replace(checkpoint, weights=weights)


def receive_start(state: TrainState) -> None:
    """On another rank: start from what rank 0 announces."""
    start = state.ranks.share("start", None)
    if "path" in start:
        start_from(state, read_checkpoint(Path(start["path"]), checked=True), start["relation"])
    elif start:
        weights = _BroadcastTensors(state.ranks, start["outlines"])
        start_from(state, Checkpoint(Path("rank 0"), 0, weights, {}, {}, start["state"]), start["relation"])


class _BroadcastTensors(Mapping[str, torch.Tensor]):
    """Tensors by name, each of which rank 0 sends when all ranks read it.

    Args:
        tensors: the tensors on rank 0; None on other ranks.
    """

    def __init__(
        self, ranks: Ranks, outlines: dict[str, list[Any]], tensors: Mapping[str, torch.Tensor] | None = None
    ) -> None:
        self.outlines, self._ranks, self._tensors = outlines, ranks, tensors
        self.shapes = {name: torch.Size(outline[0]) for name, outline in outlines.items()}

    def __getitem__(self, name: str) -> torch.Tensor:
        own = _from_outline(self.outlines[name], CPU) if self._tensors is None else self._tensors[name].contiguous()
        self._ranks.broadcast(own)
        return own

    def __iter__(self) -> Iterator[str]:
        return iter(self.outlines)

    def __len__(self) -> int:
        return len(self.outlines)


def _outline(tensor: torch.Tensor) -> list[Any]:
    return [list(tensor.shape), str(tensor.dtype).removeprefix("torch."), tensor.device.type]


def _from_outline(outline: Sequence[Any], device: torch.device) -> torch.Tensor:
    shape, dtype, kind = outline
    return torch.empty(shape, dtype=getattr(torch, dtype), device=device if kind == device.type else kind)
