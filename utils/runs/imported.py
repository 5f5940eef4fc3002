"""The modules that this process has imported: their source files, and which of them are edited or unknown to git."""

from __future__ import annotations

import functools
import os
import site
import sys
import sysconfig
import zlib
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path

from utils.runs.layout import CALLBACKS

_KNOWN: dict[str, tuple[object, int]] = {}  # module -> its spec, and the checksum of its file


def source_of(module: str) -> Path | None:
    """The Python source file that a module was imported from; None if it was not imported from one."""
    path = _source_of(sys.modules.get(module))
    return Path(path) if path else None


def _source_of(module: object) -> str | None:
    path = getattr(module, "__file__", None)
    return path if path and path.endswith(".py") and os.path.isabs(path) else None


def imported_files() -> dict[str, tuple[str, str]]:
    """Module -> the Python source file that it was imported from, as (path, path with links resolved)."""

    @functools.cache  # there are thousands of files, but few folders
    def resolved(path: str) -> str:
        folder, name = os.path.split(path)
        if name in ("", os.curdir, os.pardir) or os.path.islink(path):
            return os.path.realpath(path)
        return os.path.join(resolved(folder), name)

    paths = ((name, _source_of(module)) for name, module in list(sys.modules.items()))
    return {name: (path, resolved(path)) for name, path in paths if path is not None}


def _without_libraries(imported: Mapping[str, tuple[str, str]]) -> Iterator[tuple[str, tuple[str, str]]]:
    libraries = {os.path.realpath(sysconfig.get_path(name)) for name in ("stdlib", "purelib", "platlib")}
    libraries |= {os.path.realpath(sys.prefix), *(os.path.realpath(place) for place in site.getsitepackages())}
    above = tuple(place + os.sep for place in libraries)
    for name, (path, real) in sorted(imported.items()):
        if not (real.startswith(above) or f"{os.sep}site-packages{os.sep}" in real):
            yield name, (path, real)


def is_edited(module: str) -> bool:
    """Whether the file of an imported module has changed since the first call of this function after the import."""
    path, spec = source_of(module), getattr(sys.modules[module], "__spec__", None)
    try:
        checksum = zlib.crc32(path.read_bytes()) if path is not None else 0
    except OSError:
        return False
    known = _KNOWN.get(module)
    if known is None or known[0] is not spec:  # reloading a module gives it a new spec
        _KNOWN[module] = known = spec, checksum
    return known[1] != checksum


def edited_modules(top: Path, imported: Mapping[str, tuple[str, str]], callbacks: Mapping[str, Path]) -> Iterator[str]:
    """Describe modules of the project, and of callbacks, edited since their import; this process runs the old code.

    The arguments are those of `unknown_modules`.
    """
    root = os.path.realpath(top)
    for name, (path, real) in _without_libraries(imported):
        inside = real.startswith(root + os.sep)
        if (inside or name in callbacks) and is_edited(name):
            place = os.path.relpath(real, root) if inside else os.path.basename(path)
            yield f"{place} (edited since this process imported it: the run uses the code from before the edit)"


def unknown_modules(
    top: Path, known: Collection[str], imported: Mapping[str, tuple[str, str]], callbacks: Mapping[str, Path]
) -> Iterator[str]:
    """Describe imported modules that git does not know: ignored files of the project, and callbacks from elsewhere.

    Args:
        top: the folder of the repository.
        known: the files that git tracks or would track, relative to `top`.
        imported: the result of `imported_files`.
        callbacks: module -> file.
    """
    root = os.path.realpath(top)
    for name, (path, real) in _without_libraries(imported):
        kept = f"; kept in {CALLBACKS}" if name in callbacks else ""
        if real.startswith(root + os.sep):
            relative = os.path.relpath(real, root)
            if relative not in known and os.path.relpath(path, root) not in known:
                yield f"{relative} (imported, but git ignores it{kept})"
        elif name in callbacks:
            folder, file = os.path.split(path)
            yield f"{file} (of the callback {name}, from {folder}{kept})"
