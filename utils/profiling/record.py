"""A profile on disk: profile.json, trace.json and a picture, written together or not at all."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, ValidationError, computed_field

from utils.errors import UserError
from utils.files import output_target, read_json, write_atomic, write_json, write_output
from utils.folders import sync_folder
from utils.runs import layout

SCHEMA_VERSION: Literal[1] = 1
PROFILE, TRACE, PICTURE = "profile.json", "trace.json", "profile.png"
MATRIX_PRODUCTS, ATTENTION, OTHER_OPERATORS = "matrix products", "attention", "other operators"
OTHER_PHASE = "other"  # the phase of everything outside of the named phases
NO_OPERATOR = "no operator"  # the kind of time during which no operator runs


class Record(BaseModel):
    """A part of profile.json; unknown keys are ignored, because a later version may add some."""

    model_config = ConfigDict(frozen=True, extra="ignore", protected_namespaces=())


class Machine(Record):
    """The machine. dtype: the precision of training's matrix products. compile: whether the model was compiled."""

    device: str
    processor: str
    dtype: str
    threads: int
    torch: str
    compile: bool


class Limits(Record):
    """The machine's measured limits. gemm: GFLOP/s of a matrix product by dtype; copy_gbytes: GB/s read and written."""

    gemm: dict[str, float]
    copy_gbytes: float


class PhaseTime(Record):
    """A phase of a step. calls, ms and gflop (of matrix products) are per step."""

    name: str
    calls: float
    ms: float
    gflop: float


class OperatorTime(Record):
    """One operator in one phase, including the operators that it calls; numbers are per step under the profiler.

    kind: matrix products, attention or other operators. gbyte: estimated from shapes.
    """

    name: str
    phase: str
    kind: str
    calls: float
    ms: float
    gflop: float
    gbyte: float


class Communication(Record):
    """The communication of several ranks; the time spent waiting for it is a phase. sent_bytes: per rank and step."""

    world_size: int
    backend: str
    lanes: int | None
    sent_bytes: int


class MemoryBytes(Record):
    """Memory of training by category, in bytes; None: not measured.

    activations: the tensors of one micro-step's forward pass that autograd keeps.
    peak: the most in use during a step: by tensors on a GPU, otherwise the growth of the process since before training.
    """

    weights: int
    gradients: int
    optimizer: int
    activations: int | None = None
    peak: int | None = None


class Generation(Record):
    """The generation of one sequence.

    prefill_...: one pass over `prompt` tokens. decode_...: one token, as the mean over `decoded` tokens.
    decode_gbyte: the weights and the cached keys and values that must be read for one token.
    """

    dtype: str
    prompt: int
    prefill_ms: float
    prefill_gflop: float
    decoded: int
    decode_ms: float
    decode_gbyte: float

    @computed_field  # type: ignore[prop-decorator]
    @property
    def prefill_tokens_per_second(self) -> float:
        return 1000 * self.prompt / self.prefill_ms

    @computed_field  # type: ignore[prop-decorator]
    @property
    def decode_tokens_per_second(self) -> float:
        return 1000 / self.decode_ms


class Profile(Record):
    """The contents of profile.json.

    run, step: the training run and the step that were profiled; None: profiled by profile_model.py.
    step_ms: time of an undisturbed step; phases_ms: with a wait for the device after each phase; profiled_ms: under
        the profiler.
    gflop: GFLOP that the model needs for a step; with several ranks, for the share of one rank.
    operator_times: whether the times of operators are those of their work (on MPS, only their launches are timed).
    """

    schema_version: Literal[1] = SCHEMA_VERSION
    created: str
    run: str | None = None
    step: int | None = None
    machine: Machine
    config: dict[str, dict[str, Any]]
    parameters: int
    tokens_per_step: int
    steps: int
    step_ms: float | None
    phases_ms: float
    profiled_ms: float
    gflop: float
    limits: Limits | None
    phases: list[PhaseTime]
    operators: list[OperatorTime]
    operator_times: bool
    memory: MemoryBytes
    generation: Generation | None = None
    communication: Communication | None = None

    @property
    def best_ms(self) -> float:
        """Milliseconds of an undisturbed step if that was measured, otherwise of a step timed by phases."""
        return self.step_ms if self.step_ms is not None else self.phases_ms

    @computed_field  # type: ignore[prop-decorator]
    @property
    def tokens_per_second(self) -> float:
        return 1000 * self.tokens_per_step / self.best_ms

    @property
    def gflops(self) -> float:
        """The rate of a whole step, in GFLOP/s."""
        return 1000 * self.gflop / self.best_ms

    @property
    def gemm(self) -> float | None:
        """The limit of training's matrix products, in GFLOP/s."""
        return None if self.limits is None else self.limits.gemm[self.machine.dtype]

    @computed_field  # type: ignore[prop-decorator]
    @property
    def mfu(self) -> float | None:
        """Model FLOP/s utilisation [Chowdhery et al. 2022], relative to the measured limit of matrix products."""
        return None if self.gemm is None else self.gflops / self.gemm

    @property
    def operators_ms(self) -> dict[str, float]:
        """Milliseconds of each kind of operator, and of the time without an operator, in a step under the profiler."""
        times = dict.fromkeys((MATRIX_PRODUCTS, ATTENTION, OTHER_OPERATORS), 0.0)
        for operator in self.operators:
            times[operator.kind] += operator.ms
        return {**times, NO_OPERATOR: max(0.0, self.profiled_ms - sum(times.values()))}


def read_profile(path: Path) -> Profile:
    """Read a profile from a file, a folder written by --out, or a run directory.

    Raises:
        UserError: there is no profile, or it cannot be read.
    """
    places = [path, path / PROFILE, path / layout.PROFILE / PROFILE]
    found = next((place for place in places if place.is_file()), None)
    if found is None:
        raise UserError(f"{path}: there is no {PROFILE}: python profile_model.py --out DIR writes one")
    try:
        record = read_json(found)
        version = record["schema_version"]
        if version != SCHEMA_VERSION:
            raise UserError(f"{found}: schema_version is {version}; this program reads {SCHEMA_VERSION}")
        return Profile.model_validate(record)
    except ValidationError as error:
        first = error.errors()[0]
        raise UserError(f"{found}: not a profile: {'.'.join(map(str, first['loc']))}: {first['msg']}") from None
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{found}: not a profile: {type(error).__name__}: {error}") from None


def save_profile(folder: Path, profile: Profile, trace: bytes, draw: Callable[[Profile, Path], object]) -> list[Path]:
    """Write the three files into `folder`, creating it; if one cannot be written, none is replaced.

    Args:
        trace: a Chrome trace (open it in chrome://tracing or Perfetto).
        draw: writes the picture of a profile to a path.

    Raises:
        OSError: the folder cannot be created or written, or the disk is full.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder, prefix=".profile.") as name:
        new = Path(name)
        write_atomic(new / TRACE, trace)
        draw(profile, new / PICTURE)
        write_json(new / PROFILE, profile.model_dump(mode="json"))
        names = (TRACE, PICTURE, PROFILE)
        for file in names:
            if output_target(folder / file) == Path(os.path.realpath(folder)) / file:
                os.replace(new / file, folder / file)
            else:  # keep a link or a device in its place
                write_output(folder / file, (new / file).read_bytes())
    sync_folder(folder)
    return [folder / file for file in reversed(names)]
