"""The seal of a run: checksums of its files, written when it ends and verified by `experiments.py check`.

A seal detects accidents, such as an edited file, a bad disk or an incomplete copy. It does not protect against somebody
who changes both the files and the seal.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from utils.checkpoints.folder import (
    FILES,
    MANIFEST_FILE,
    CheckpointError,
    check_file,
    list_checkpoints,
    read_manifest,
)
from utils.files import is_regular, open_regular, read_json, write_json
from utils.runs.layout import CHECKPOINTS, EXPORT, LOGS, META, OLD_TENSORBOARD, SEAL, WANDB, fed_note
from utils.runs.run import RunError, utc_now

SEALED = (META, LOGS, EXPORT)
NOT_SEALED = (OLD_TENSORBOARD, WANDB)  # folders in these that are made from the logs, and can be made again


@dataclass(frozen=True)
class SealCheck:
    """The differences between the files of a run and its seal; paths are relative to the run directory.

    sealed: when the seal was written (UTC).
    files: number of files in the seal.
    checkpoints: number of checkpoints that were verified by their manifests.
    damaged: what is wrong with the checkpoints.
    """

    sealed: str
    files: int
    changed: list[str]
    missing: list[str]
    added: list[str]
    checkpoints: int
    damaged: list[str]

    @property
    def good(self) -> bool:
        return not (self.changed or self.missing or self.added or self.damaged)


def sealed_files(run: Path) -> Iterator[str]:
    """The files that a seal covers, sorted, as paths relative to the run directory.

    Only regular files of the run are covered, because reading a pipe would block and a link may lead elsewhere.
    """
    return (name for name, regular in _entries(run) if regular)


def _entries(run: Path) -> Iterator[tuple[str, bool]]:
    """Yield each file in the folders that a seal covers, and whether it is a regular file of this run."""
    note = fed_note("*")  # changes after the seal; the other patterns are for the temporary files of its writers
    fed_notes = [note.as_posix(), note.with_suffix(".tmp").as_posix(), f"{LOGS}/.{note.name}.*.tmp"]
    for folder in SEALED:
        for root, folders, names in os.walk(run / folder):
            relative = Path(root).relative_to(run)
            folders[:] = sorted(name for name in folders if relative / name not in NOT_SEALED)
            links = [name for name in folders if os.path.islink(os.path.join(root, name))]  # not followed
            for name in sorted([*names, *links]):
                path = (relative / name).as_posix()
                if not any(Path(path).match(pattern) for pattern in fed_notes):
                    yield path, is_regular(run / path, run)


def checksums(run: Path, checksum: Callable[[Path], str]) -> dict[str, str]:
    """Compute the checksum of each file that a seal covers, by path relative to the run directory."""
    names = list(sealed_files(run))
    with ThreadPoolExecutor(min(4, os.cpu_count() or 1)) as pool:  # hashing releases the GIL
        return dict(zip(names, pool.map(lambda name: checksum(run / name), names), strict=True))


def file_sha256(path: Path) -> str:
    """The SHA-256 of a file in hexadecimal digits.

    Raises:
        OSError: the file cannot be read.
    """
    with open_regular(path) as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _sha256_or_reason(path: Path) -> str:
    try:
        return file_sha256(path)
    except OSError as error:
        return f"cannot be read: {error.strerror}"


def write_seal(run: Path) -> None:
    """Write the checksums of the run directory `run` into artifacts/seal.json.

    Raises:
        OSError: a file cannot be read, or the seal cannot be written.
    """
    files = checksums(run, file_sha256)
    manifests = {path.name: _sha256_or_reason(path / MANIFEST_FILE) for _, path in list_checkpoints(run / CHECKPOINTS)}
    write_json(run / SEAL, {"time": utc_now(), "files": files, "manifests": manifests})


def read_seal(run: Path) -> tuple[Mapping[str, str], Mapping[str, str], str]:
    """Read the seal of a run: the checksums of its files, those of the manifests of its checkpoints, and its time.

    Raises:
        RunError: the run has no seal, or the seal is damaged.
    """
    try:
        recorded = read_json(run / SEAL, run)
        if not isinstance(recorded["files"], dict):
            raise ValueError("no files")
        manifests = dict(recorded.get("manifests", {}))  # older seals have none
        return recorded["files"], manifests, str(recorded["time"])
    except FileNotFoundError:
        raise RunError(f"{run.name} has no seal: it has not ended yet, or was killed") from None
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise RunError(f"{run / SEAL} cannot be read: {error}") from None


def checkpoints_are_gone(run: Path) -> bool:
    """Whether a run ended with checkpoints, according to its seal, but has none now: pruned, or not copied along."""
    if list_checkpoints(run / CHECKPOINTS):
        return False
    try:
        _, manifests, _ = read_seal(run)
    except RunError:
        return False
    return bool(manifests)


def verify_seal(run: Path) -> SealCheck:
    """Compare the files of the run directory `run` with its seal; a file that cannot be read counts as changed.

    Raises:
        RunError: the run has no seal, or the seal is damaged.
    """
    old, manifests, sealed = read_seal(run)
    new = checksums(run, _sha256_or_reason)
    checkpoints = [path for _, path in list_checkpoints(run / CHECKPOINTS)]
    return SealCheck(
        sealed=sealed,
        files=len(old),
        changed=[name for name in old if name in new and new[name] != old[name]],
        missing=[name for name in old if name not in new],
        added=[name for name, _ in _entries(run) if name not in old],
        checkpoints=len(checkpoints),
        damaged=[damage for path in checkpoints for damage in _damages(path, manifests.get(path.name))],
    )


def _damages(checkpoint: Path, sealed: str | None) -> Iterator[str]:
    """Yield what is wrong with the files of a checkpoint.

    Args:
        sealed: the checksum of its manifest in the seal; None if the seal is of an older version, or was written
            before the checkpoint by a process that was killed later.
    """
    manifest, problem = dict.fromkeys(FILES, (0, "")), None
    try:
        manifest = read_manifest(checkpoint)
    except CheckpointError as error:
        problem = _relative(error, checkpoint)
    for path in sorted(checkpoint.iterdir()):
        if path.name not in (*manifest, MANIFEST_FILE):
            yield f"{_name(checkpoint)}/{path.name}: not in its manifest"
    if problem is not None:
        yield problem
        return
    if sealed is not None and _sha256_or_reason(checkpoint / MANIFEST_FILE) != sealed:
        yield f"{_name(checkpoint)}/{MANIFEST_FILE}: not as sealed"
    for name, (size, crc32) in manifest.items():
        try:
            check_file(checkpoint / name, size, crc32)
        except CheckpointError as error:
            yield _relative(error, checkpoint)


def _relative(error: CheckpointError, checkpoint: Path) -> str:
    return str(error).replace(str(checkpoint), _name(checkpoint))


def _name(checkpoint: Path) -> str:
    return f"{CHECKPOINTS.as_posix()}/{checkpoint.name}"
