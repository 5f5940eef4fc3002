"""Building the views of a run from its recorded configuration, both for live feeding and for a rebuild."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Literal

from utils.config.settings import Config
from utils.runs.layout import OLD_TENSORBOARD
from utils.runs.run import read_record
from utils.tracking import RunFacts, View
from utils.tracking.aim import REMOTE, AimView
from utils.tracking.tensorboard import TensorBoardView
from utils.tracking.wandb import WandbView

AIM_ENDS = (3, 13)  # the first version of Python without builds of Aim, as in requirements.in


def wanted_views(config: Config) -> Iterator[str]:
    """Names of the views that a run with this configuration feeds."""
    yield "tensorboard"
    if config.tracking.aim_logging:
        yield "aim"
    if config.tracking.wandb_mode != "disabled":
        yield "wandb"


def is_installed(name: str) -> bool:
    """Whether the package of a view is installed; does not import it."""
    return importlib.util.find_spec(name) is not None


def without_builds(name: str) -> str | None:
    """Why a view's package cannot be installed in this Python, as text; None if it can."""
    if name == "aim" and (sys.version_info[:2] >= AIM_ENDS or sys.platform == "win32"):
        version = ".".join(map(str, sys.version_info[:2]))
        return f"aim has no builds for Python {version} on {sys.platform}"
    return None


def build_views(names: Iterable[str], run: Path, config: Config, root: Path) -> list[View]:
    """The views of the run in the directory `run`. They are not opened yet.

    Args:
        root: the folder that relative paths start from.

    Raises:
        RunError, OSError, ValueError: a file of the run is missing or damaged.
    """
    facts, views = RunFacts.read(run), read_record(run)["views"]
    known = views.get("aim", {})
    repo = config.tracking.aim_repo
    if not repo.startswith(REMOTE):
        repo = str(root / repo)
    mode: Literal["offline", "online"] = "online" if config.tracking.wandb_mode == "online" else "offline"
    makers: dict[str, Callable[[], View]] = {
        "tensorboard": lambda: TensorBoardView(facts, old if (old := run / OLD_TENSORBOARD).is_dir() else run),
        "aim": lambda: AimView(facts, repo, known.get("hash") if _same_repo(known.get("repo"), repo) else None),
        "wandb": lambda: WandbView(facts, mode, views.get("wandb", {}).get("id")),
    }
    return [makers[name]() for name in names]


def _same_repo(before: str | None, now: str) -> bool:
    """Whether `now` is the Aim repository that a run was fed to, even if the project has moved since."""
    if before is None or before == now:
        return before == now
    return not before.startswith(REMOTE) and not now.startswith(REMOTE) and not Path(before, ".aim").exists()
