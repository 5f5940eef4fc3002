"""The environment of a run, meta/env.txt: Python, the machine, and the installed packages with their versions."""

from __future__ import annotations

import functools
import os
import platform
import re
import sys
from collections.abc import Mapping
from importlib import metadata as importlib_metadata
from pathlib import Path

from utils.files import read_text
from utils.runs.layout import ENVIRONMENT


@functools.cache
def package_versions() -> Mapping[str, str]:
    """The version of each installed package, by name. Cached, because hundreds of files are read.

    Only the two relevant lines are extracted, because parsing all metadata of a package takes ten times as long.
    """
    found = {}
    for package in importlib_metadata.distributions():
        text = package.read_text("METADATA") or package.read_text("PKG-INFO") or ""
        headers = dict(re.findall(r"^(Name|Version): (.+)$", text.partition("\n\n")[0], re.MULTILINE))
        if len(headers) == 2:
            found[headers["Name"].strip()] = headers["Version"].strip()
    return found


def read_environment(run: Path) -> str:
    """Read meta/env.txt of the run directory `run`; empty if the file does not exist.

    Raises:
        OSError: the file cannot be read.
    """
    try:
        return read_text(run / ENVIRONMENT, run, "replace")
    except FileNotFoundError:
        return ""


def environment_text(devices: Mapping[str, str]) -> str:
    """The content of env.txt: Python, platform, devices and package versions, one per line."""
    versions = package_versions()
    lines = [
        f"python: {sys.version.split()[0]} ({platform.python_implementation()})",
        f"platform: {platform.platform()}",
        f"cpus: {os.cpu_count()}",
        *(f"{name}: {value}" for name, value in devices.items()),
        "",
        "packages:",
        *(f"  {name}=={versions[name]}" for name in sorted(versions, key=str.lower)),
    ]
    return "\n".join(lines) + "\n"
