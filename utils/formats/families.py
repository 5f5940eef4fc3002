"""The families of models that can be imported and exported, and the choice of one for a config.json or our model."""

from __future__ import annotations

from utils.config.settings import ModelConfig
from utils.errors import nearest, shown
from utils.formats.foreign_config import ForeignConfig, refuse_own_code
from utils.formats.foreign_files import ForeignConfigError
from utils.formats.gpt2 import GPT2
from utils.formats.llama import LLAMA
from utils.formats.mistral import MISTRAL
from utils.formats.qwen import QWEN2, QWEN3
from utils.formats.table import Family, FormatError

FAMILIES: dict[str, Family] = {family.architecture: family for family in (GPT2, LLAMA, MISTRAL, QWEN2, QWEN3)}


def family_of(config: ForeignConfig) -> Family:
    """The family that a config.json names.

    Raises:
        ForeignConfigError: the family is unknown, or the model brings its own code or is quantized.
    """
    refuse_own_code(config)
    named = config.values.get("architectures") or []
    if not isinstance(named, list) or not all(isinstance(name, str) for name in named):
        raise config.refuse("architectures", "a list of names")
    by_type = {family.model_type: family.architecture for family in FAMILIES.values()}
    name = named[0] if named else by_type.get(str(config.values.get("model_type")), "")
    if name not in FAMILIES or len(named) > 1:
        raise ForeignConfigError(
            f"{config.name}: architectures: expected one of {', '.join(FAMILIES)}, got "
            f"{shown(named or config.values.get('model_type'))}{nearest(name, FAMILIES)}"
        )
    return FAMILIES[name]


def family_for(config: ModelConfig, preferred: str | None = None) -> Family:
    """The family in which a model of ours is exported.

    Args:
        preferred: the architecture of the model that training started from; chosen if it fits.

    Raises:
        FormatError: no family can represent the model; the message names what the nearest one cannot.
    """
    order = sorted(FAMILIES.values(), key=lambda family: family.architecture != preferred)
    refusals = {family.architecture: family.refusals(config) for family in order}
    for family in order:
        if not refusals[family.architecture]:
            return family
    closest = min(refusals, key=lambda name: len(refusals[name]))
    raise FormatError(
        f"no family of transformers that is known here can hold this model; the nearest, {closest}, cannot hold: "
        f"{', '.join(refusals[closest])}"
    )
