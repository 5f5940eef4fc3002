"""Building a wheel with setuptools: the scripts, utils/ and configs/ become files of the package lm_workbench."""

from __future__ import annotations

import shutil
from pathlib import Path

from setuptools.command.build_py import build_py

ROOT = Path(__file__).resolve().parents[1]
IGNORED = shutil.ignore_patterns("__pycache__", "*.pyc")


class BuildWithScripts(build_py):
    """build_py that also copies the files of the checkout; an editable installation uses them in place."""

    def run(self) -> None:
        target = Path(self.build_lib) / "lm_workbench"
        if not self.editable_mode:
            shutil.rmtree(target, ignore_errors=True)  # files of an older build
        super().run()
        if self.editable_mode:
            return
        for script in ROOT.glob("*.py"):
            shutil.copy2(script, target)
        for folder in ("utils", "configs"):
            shutil.copytree(ROOT / folder, target / folder, ignore=IGNORED)
