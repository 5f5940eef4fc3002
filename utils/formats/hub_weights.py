"""Download the large files of a model on the hub so that the next try continues where a killed one stopped.

huggingface_hub gives each process a partial file of its own and deletes it at the end. Here the partial file is named
after the hash of the content, so it is continued as long as the hub has that content. Once its own hash is right, it is
renamed to where huggingface_hub expects the file.
"""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from utils.errors import UserError
from utils.files import read_text
from utils.terminal.words import size

SHA256 = re.compile(r"[0-9a-f]{64}")
NOTES = Path(".cache", "huggingface", "download")  # in a folder: where huggingface_hub keeps a note about each file
CHUNK = 1 << 22


class DamagedError(UserError):
    """A file does not have the hash that the hub states."""


def fetch_weights(
    hub: Any, name: str, commit: str, listed: Any, local_dir: Path | None, report: Callable[[str], None]
) -> None:
    """Download a file into the cache of the hub or a folder, unless it is already there.

    Args:
        hub: the package huggingface_hub.
        listed: the entry of the file in the model's list of files; without a SHA-256, the file is left to
            huggingface_hub.
        report: prints one line to the user.

    Raises:
        DamagedError: the downloaded file has another hash; it is deleted.
        OSError and the errors of huggingface_hub: the download failed; what has arrived is kept for the next try.
    """
    from huggingface_hub.file_download import repo_folder_name
    from huggingface_hub.utils import WeakFileLock

    if listed.lfs is None or not SHA256.fullmatch(listed.lfs.sha256):
        return
    file, sha256 = listed.rfilename, listed.lfs.sha256
    if local_dir is None:
        cache, folder = Path(hub.constants.HF_HUB_CACHE), repo_folder_name(repo_id=name, repo_type="model")
        place, partial_folder = cache / folder / "blobs" / sha256, cache / folder / "blobs"
        lock = cache / ".locks" / folder / f"{sha256}.lock"  # the one that huggingface_hub takes
    else:
        if isinstance(hub.try_to_load_from_cache(name, file, revision=commit), str):
            return  # huggingface_hub copies it from there
        place, partial_folder = local_dir / file, local_dir / NOTES
        lock = partial_folder / f"{file}.lock"
    for parent in (partial_folder, lock.parent):
        parent.mkdir(parents=True, exist_ok=True)
    with WeakFileLock(lock):
        if place.exists() and (local_dir is None or noted(local_dir, file)[1] in (None, sha256)):
            return
        partial = partial_folder / f"{file}.{sha256}.incomplete"
        for other in partial_folder.glob(f"{file}.*.incomplete"):
            if other != partial:  # has content that the hub no longer has
                other.unlink()
        _complete(partial, hub.hf_hub_url(name, file, revision=commit), listed, report)
        if local_dir is not None:  # the note describes the file that was there before
            note_of(local_dir, file).unlink(missing_ok=True)
        os.replace(partial, place)


def _complete(partial: Path, url: str, listed: Any, report: Callable[[str], None]) -> None:
    """Download the rest of a partial file, sync it and check its hash. The arguments are those of `fetch_weights`.

    Raises:
        DamagedError: the file has another hash; it is deleted.
    """
    from huggingface_hub.file_download import http_get
    from huggingface_hub.utils import build_hf_headers

    file, sha256, bytes = listed.rfilename, listed.lfs.sha256, listed.lfs.size
    with open(partial, "ab") as target:
        if target.tell() > bytes:
            target.truncate(0)
        if here := target.tell():
            report(f"{file}: {size(here)} of {size(bytes)} are already downloaded")
        http_get(
            url,
            target,
            resume_size=here,
            headers=build_hf_headers(),
            expected_size=bytes,
            displayed_filename=file,
        )
        target.flush()
        os.fsync(target.fileno())
    if (found := file_hash(partial, sha256)) != sha256:
        partial.unlink()
        raise DamagedError(
            f"{file}: damaged ({size(bytes)}): its hash is {found[:16]}..., not {sha256[:16]}...; it was "
            "deleted: run the command again"
        )


def note_of(folder: Path, file: str) -> Path:
    """The note of huggingface_hub about a file that it has downloaded into a folder."""
    return folder / NOTES / f"{file}.metadata"


def noted(folder: Path, file: str) -> tuple[str | None, str | None]:
    """(commit, hash) of a file that was downloaded into a folder, from its note; None, None without a note."""
    try:
        lines = read_text(note_of(folder, file), folder)[:1000].splitlines()
    except (OSError, ValueError):
        return None, None
    return (lines[0], lines[1]) if len(lines) >= 2 else (None, None)


def file_hash(path: Path, like: str) -> str:
    """The hash of a file in the form of `like`, a hash that the hub states: SHA-256, or git's SHA-1 of small files."""
    digest = hashlib.sha256() if len(like) == 64 else hashlib.sha1(f"blob {path.stat().st_size}\0".encode())
    with open(path, "rb") as file:
        while chunk := file.read(CHUNK):
            digest.update(chunk)
    return digest.hexdigest()
