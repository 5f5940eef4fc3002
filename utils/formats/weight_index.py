"""model.safetensors.index.json: which file has which tensor, if the weights of a model are in several files."""

from __future__ import annotations

from pathlib import Path

from utils.errors import shown
from utils.formats.foreign_files import ForeignConfigError, read_bounded_json

INDEX = "model.safetensors.index.json"


def read_weight_index(path: Path) -> dict[str, set[str]]:
    """The names of the tensors in each file, by the name of the file, sorted.

    Raises:
        ForeignConfigError: it is damaged, or names anything but .safetensors files in its own folder.
    """
    mapping = read_bounded_json(path).get("weight_map")
    if not isinstance(mapping, dict) or not mapping:
        raise ForeignConfigError(f"{path}: weight_map: expected an object that names files")
    of_file: dict[str, set[str]] = {}
    for tensor, name in mapping.items():
        if not isinstance(name, str) or Path(name).name != name or not name.endswith(".safetensors"):
            raise ForeignConfigError(
                f"{path}: weight_map: expected the name of a .safetensors file beside it, got {shown(name)}"
            )
        of_file.setdefault(name, set()).add(tensor)
    return dict(sorted(of_file.items()))
