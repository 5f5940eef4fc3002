"""Find out which program wrote a checkpoint, and read its model."""

from __future__ import annotations

import os
from pathlib import Path

from utils.errors import SHOWN, UserError, cut
from utils.files import open_named
from utils.formats.c_files import LLM_C, read_layout
from utils.formats.foreign import Foreign
from utils.formats.llama2_c import read_llama2_c
from utils.formats.llm_c import read_llm_c
from utils.formats.mypt import is_mypt, read_mypt
from utils.formats.nanogpt import is_nanogpt, read_nanogpt
from utils.formats.pickles import read_pickle

PROGRAMS = "ckpt.pt of nanoGPT, a folder of MyPT, or a .bin of llm.c or llama2.c"
ARCHIVE = b"PK\x03\x04"  # the first bytes of a file that torch.save wrote
CHECKPOINT = "ckpt.pt"


def read_foreign(path: Path) -> Foreign:
    """Read a model that another program wrote.

    Raises:
        UserError: there is none, the program is unknown, or the model has something that cannot be represented.
    """
    if path.is_dir():
        if is_mypt(path):
            return read_mypt(path)
        models = sorted(path.glob("model_[0-9]*.bin"))  # of llm.c; the newest is the last
        found = [path / CHECKPOINT] if (path / CHECKPOINT).is_file() else models[-1:]
        if not found:
            raise UserError(f"{path}: expected {PROGRAMS}")
        path = found[0]
    try:
        with open_named(path) as file:
            start = file.read(4)
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}") from None
    if start == ARCHIVE or path.suffix in (".pt", ".pth", ".ckpt"):
        checkpoint = read_pickle(path)
        if is_nanogpt(checkpoint):
            return read_nanogpt(path, checkpoint)
        has = ", ".join(map(str, checkpoint)) if isinstance(checkpoint, dict) else f"a {type(checkpoint).__name__}"
        raise UserError(f"{path}: expected model and model_args, as nanoGPT writes them; it has {cut(has, SHOWN)}")
    layout = read_layout(path)
    if layout is None:
        raise UserError(f"{path}: expected {PROGRAMS}")
    return read_llm_c(path, layout) if layout.program == LLM_C else read_llama2_c(path, layout)


def name_of(path: Path) -> str:
    """The last part of a path: records name no folders of the machine."""
    return os.path.basename(os.path.abspath(path))
