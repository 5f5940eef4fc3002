"""Find a published model by name: in a local folder, the cache of the Hugging Face hub, or on the hub, in this order.

The optional package huggingface_hub does the work; a model in a folder does not need it. Its environment variables
apply: HF_HOME, HF_HUB_CACHE, HF_TOKEN, HF_ENDPOINT, and HF_HUB_OFFLINE, which forbids the network.
"""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from utils.errors import UserError, first_line
from utils.files import DISK_ERRORS, expand_home
from utils.formats.foreign_files import ForeignConfigError
from utils.formats.hub_weights import NOTES, DamagedError, fetch_weights, file_hash, note_of, noted
from utils.formats.pretrained import CONFIG
from utils.formats.shards import PICKLES, WEIGHTS
from utils.formats.weight_index import INDEX, read_weight_index
from utils.terminal.words import size

SHARDS = "model-*-of-*.safetensors"
PATTERNS = (  # the files that are downloaded; many models also have weights in other formats
    *(WEIGHTS, INDEX, SHARDS, CONFIG, "generation_config.json", "tokenizer.json"),
    *("tokenizer_config.json", "special_tokens_map.json", "chat_template.jinja", "README.md", "LICENSE*"),
)
NAME = re.compile(r"[A-Za-z0-9][\w.-]{0,95}(/[A-Za-z0-9][\w.-]{0,95})?", re.ASCII)


class HubError(UserError):
    """A published model is not on this machine and cannot be downloaded, or its files are damaged."""


@dataclass(frozen=True)
class Found:
    """A published model on this machine.

    where: where it was found, in words.
    revision: the commit; None if a folder does not record it.
    """

    folder: Path
    where: str
    revision: str | None = None


def find_pretrained(
    name: str,
    *,
    local_dir: Path | None = None,
    revision: str | None = None,
    report: Callable[[str], None] = lambda line: None,
) -> Found:
    """Find a published model, and download it if it is not on this machine.

    Args:
        name: a folder, or NAME or ORGANISATION/NAME of the hub.
        local_dir: a folder that has the model or is to be downloaded into; None for the cache of the hub.
        revision: a branch, tag or commit.
        report: prints one line to the user.

    Raises:
        HubError: it is not on this machine and cannot be downloaded.
    """
    for folder in (local_dir, Path(expand_home(name))):
        if folder is not None and revision is None and (folder / CONFIG).is_file() and not _is_partial(folder):
            return Found(Path(os.path.abspath(folder)), f"the folder {folder}", _commit_of(folder))
    check_name(name)
    hub = _hub(name)
    if local_dir is None:
        try:
            folder = Path(
                hub.snapshot_download(name, revision=revision, local_files_only=True, allow_patterns=PATTERNS)
            )
            if is_whole(folder):
                return Found(folder, f"the cache of the hub, {hub.constants.HF_HUB_CACHE}", folder.name)
        except OSError:  # not in the cache, or not completely
            pass
    return download(name, local_dir=local_dir, revision=revision, report=report)


def _is_partial(folder: Path) -> bool:
    """Whether a folder has an unfinished download."""
    return (folder / NOTES).is_dir() and not is_whole(folder)


def check_name(name: str) -> None:
    """Raises HubError unless a model on the hub can have this name."""
    if not NAME.fullmatch(name) or ".." in name:
        raise HubError(f"{name}: no folder with a {CONFIG}, and not a name of the hub (NAME or ORGANISATION/NAME)")


def _hub(name: str) -> Any:
    """The package huggingface_hub.

    Raises:
        HubError: it is not installed.
    """
    try:
        import huggingface_hub
        import huggingface_hub.constants
    except ImportError:
        raise HubError(
            f"{name} is not a folder with a {CONFIG}; the hub and its cache need the package huggingface_hub: "
            "pip install huggingface_hub"
        ) from None
    return huggingface_hub


def download(
    name: str,
    *,
    local_dir: Path | None = None,
    revision: str | None = None,
    report: Callable[[str], None] = lambda line: None,
) -> Found:
    """Download a model from the hub into its cache or a folder, and compare the files with the hub's hashes.

    Files that are already there are not downloaded again, and a partial file of weights from an interrupted download is
    continued. config.json comes last, so a folder that has it is complete.

    Raises:
        HubError: the hub cannot be reached, has no such model or denies access, or a file has another hash.
        OSError: the disk is full or fails.
    """
    check_name(name)
    hub = _hub(name)
    if hub.constants.HF_HUB_OFFLINE:
        flags = "".join(f" --{flag} {value}" for flag, value in (("out", local_dir), ("revision", revision)) if value)
        raise HubError(
            f"{name} is not on this machine (no such folder, and not in {hub.constants.HF_HUB_CACHE}), and "
            f"HF_HUB_OFFLINE forbids the network; with a network: python weights.py download {name}{flags}"
        )
    page = f"{hub.constants.ENDPOINT}/{name}"
    with _errors_explained(hub, name, page, local_dir, revision):
        facts = hub.HfApi().model_info(name, revision=revision, files_metadata=True)
        files = facts.siblings or []
        _check_files(name, [file.rfilename for file in files])
        report(f"downloading {name} from {page}")
        for file in files:
            if file.rfilename == WEIGHTS or fnmatch(file.rfilename, SHARDS):
                fetch_weights(hub, name, facts.sha, file, local_dir, report)
        for ignored in ([CONFIG], None):
            folder = Path(
                hub.snapshot_download(
                    name, revision=facts.sha, local_dir=local_dir, allow_patterns=PATTERNS, ignore_patterns=ignored
                )
            )
        if local_dir is None and revision != facts.sha:  # so that the name is also found without the network
            _remember(folder, revision or "main", facts.sha)
    check_hashes(folder, remove=True)
    return Found(folder, f"downloaded from {page} into {folder}", facts.sha)


@contextlib.contextmanager
def _errors_explained(hub: Any, name: str, page: str, local_dir: Path | None, revision: str | None) -> Iterator[None]:
    """Turn the errors of a download into one line that says what to do.

    Args:
        page: the address of the model.

    Raises:
        HubError: the hub cannot be reached, has no such model or denies access, or a file is damaged.
        OSError: the disk is full or fails.
    """
    from huggingface_hub.errors import GatedRepoError, HfHubHTTPError, RepositoryNotFoundError, RevisionNotFoundError

    try:
        yield
    except GatedRepoError:
        raise HubError(
            f"{name} is gated: accept its conditions on {page}, make a token on {hub.constants.ENDPOINT}"
            "/settings/tokens and run again with HF_TOKEN=...; or sign in with `hf auth login`"
        ) from None
    except RevisionNotFoundError:
        raise HubError(f"{name} has no revision {revision}: {page}/commits lists them") from None
    except RepositoryNotFoundError:
        raise HubError(
            f"{name}: there is no such model on {hub.constants.ENDPOINT}, or it is private and needs HF_TOKEN"
        ) from None
    except HfHubHTTPError as error:
        raise HubError(f"{name}: {page} answers {first_line(error)}; try again later") from None
    except DamagedError as error:
        raise HubError(f"{name}/{error}") from None
    except HubError:
        raise
    except OSError as error:
        if error.errno in DISK_ERRORS:
            raise OSError(error.errno, error.strerror, str(local_dir or hub.constants.HF_HUB_CACHE)) from None
        raise HubError(f"{name} cannot be downloaded: {first_line(error)}") from None
    except Exception as error:  # errors of its HTTP client, which differs between releases
        if type(error).__module__.split(".")[0] not in ("httpx", "httpx2", "httpcore", "requests", "urllib3", "hf_xet"):
            raise
        raise HubError(
            f"{name}: {hub.constants.ENDPOINT} cannot be reached: {first_line(error)}; on a machine that can reach it, "
            f"python weights.py download {name} --out DIR makes a folder to use instead"
        ) from None


def _check_files(name: str, files: list[str]) -> None:
    """Raises HubError unless a model has weights in safetensors and a config.json."""
    if WEIGHTS not in files and INDEX not in files:
        pickle = next((file for file in PICKLES if file in files), None)
        if pickle:
            raise HubError(
                f"{name} has its weights as {pickle} only, a pickle, which can run any code when it is read, so it is "
                "refused; many models have a revision with safetensors (refs/convert/safetensors, refs/pr/N)"
            )
        raise HubError(f"{name} has no {WEIGHTS} and no {INDEX}: it is not a model in safetensors")
    if CONFIG not in files:
        raise HubError(f"{name} has no {CONFIG}")


def _remember(folder: Path, revision: str, commit: str) -> None:
    """Record in the cache which commit a branch or tag refers to."""
    if folder.parent.name == "snapshots" and re.fullmatch(r"[\w./-]+", revision) and ".." not in revision:
        note = folder.parent.parent / "refs" / revision
        note.parent.mkdir(parents=True, exist_ok=True)
        note.write_text(commit)


def is_whole(folder: Path) -> bool:
    """Whether a folder has a config.json and all files of weights."""
    if not (folder / CONFIG).exists():
        return False
    if (folder / WEIGHTS).exists() or not (folder / INDEX).exists():
        return (folder / WEIGHTS).exists()
    try:
        names = read_weight_index(folder / INDEX)
    except ForeignConfigError:
        return True  # a damaged index is reported when the model is opened
    return all((folder / name).exists() for name in names)


def _commit_of(folder: Path) -> str | None:
    """The commit of a downloaded folder; None if it is not recorded."""
    if folder.parent.name == "snapshots":
        return folder.name
    for note in (folder / NOTES).glob("*.metadata"):
        return noted(folder, note.stem)[0]
    return None


def recorded_hashes(folder: Path) -> Iterator[tuple[Path, str]]:
    """The files of a downloaded model, each with its hash on the hub: SHA-256, or for a small file git's SHA-1."""
    for path in sorted(folder.iterdir()):
        found: str | None = None
        if folder.parent.name == "snapshots" and path.is_symlink():
            found = Path(os.readlink(path)).name
        elif path.is_file():
            found = noted(folder, path.name)[1]
        if found and re.fullmatch(r"[0-9a-f]{40}|[0-9a-f]{64}", found):
            yield path, found


def check_hashes(folder: Path, *, remove: bool = False) -> list[str]:
    """Compare the files of a downloaded model with their hashes on the hub, as recorded when it was downloaded.

    Args:
        remove: delete a file with another hash, so that it is downloaded again.

    Returns:
        The names of the files that were compared; those without a recorded hash are not.

    Raises:
        HubError: a file has another hash.
    """
    good = []
    for path, expected in recorded_hashes(folder):
        real = Path(os.path.realpath(path))
        if (digest := file_hash(real, expected)) != expected:
            length = size(real.stat().st_size)
            if remove:
                for place in (path, real, note_of(folder, path.name)):
                    place.unlink(missing_ok=True)
            raise HubError(
                f"{path}: damaged ({length}): its hash is {digest[:16]}..., not {expected[:16]}...; "
                + ("it was deleted: run the command again" if remove else "download it again")
            )
        good.append(path.name)
    return good
