"""Read the config.json of another program: every value is checked, and what we cannot represent is refused by name."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from typing import Any

from utils.config.settings import ModelConfig
from utils.errors import number_text, shown
from utils.formats.foreign_files import ForeignConfigError

# Keys that do not change what a model computes.
HARMLESS = frozenset(
    (
        *("_name_or_path", "architectures", "model_type", "tokenizer_class", "transformers_version", "use_cache"),
        *("bos_token_id", "eos_token_id", "pad_token_id", "unk_token_id", "initializer_range", "pretraining_tp"),
        *("dtype", "torch_dtype", "is_decoder", "is_encoder_decoder", "id2label", "label2id", "problem_type", "n_ctx"),
        *("summary_activation", "summary_first_dropout", "summary_proj_to_labels", "summary_type", "summary_use_proj"),
        *("task_specific_params", "return_dict", "output_attentions", "output_hidden_states"),
        *("chunk_size_feed_forward", "keys_to_ignore_at_inference", "transformers.js_config"),
    )
)
ROPE_TYPES = ("default", "linear", "llama3", "yarn")


class ForeignConfig:
    """The values of a config.json (or of an object in it) by key. It records which keys have been read.

    Args:
        values: as parsed.
        name: the file, for messages.
        part: the path of the object in the file, for messages: empty, or ending in a dot.
    """

    def __init__(self, values: Mapping[str, Any], name: str, part: str = "") -> None:
        self.values, self.name, self._part = values, name, part
        self._read: set[str] = set()

    def refuse(self, key: str, expected: str) -> ForeignConfigError:
        """The error for the value of `key`."""
        return ForeignConfigError(
            f"{self.name}: {self._part}{key}: expected {expected}, got {shown(self.values.get(key))}"
        )

    def _get(self, key: str, default: Any) -> Any:
        self._read.add(key)
        value = self.values.get(key)
        return default if value is None else value

    def integer(self, key: str, default: int | None = None) -> int:
        """A whole number of at least 1; required if there is no default."""
        value = self._get(key, default)
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise self.refuse(key, "a whole number >= 1")
        return value

    def optional_integer(self, key: str) -> int | None:
        """As `integer`, but None if it is missing or null."""
        return None if self._get(key, None) is None else self.integer(key)

    def number(self, key: str, default: float | None = None) -> float:
        """A finite number above 0; required if there is no default."""
        value = self._get(key, default)
        if not isinstance(value, int | float) or isinstance(value, bool) or not 0 < value < math.inf:
            raise self.refuse(key, "a number above 0")
        return float(value)

    def flag(self, key: str, default: bool) -> bool:
        """True or false."""
        value = self._get(key, default)
        if not isinstance(value, bool):
            raise self.refuse(key, "true or false")
        return value

    def choice(self, key: str, words: Mapping[str, str], default: str) -> str:
        """The entry of `words` for the value."""
        value = self._get(key, default)
        if not isinstance(value, str) or value not in words:
            raise self.refuse(key, " or ".join(words))
        return words[value]

    def only(self, key: str, *values: Any) -> None:
        """Refuse any value but these, which our model can compute; a missing value means the first."""
        value = self._get(key, values[0])
        if not any(value == accepted and isinstance(value, bool) == isinstance(accepted, bool) for accepted in values):
            raise self.refuse(key, " or ".join(json.dumps(accepted) for accepted in values))

    def skip(self, *keys: str) -> None:
        """Mark keys as read: they do not matter here, or the caller checks them."""
        self._read |= set(keys)

    def part(self, key: str) -> ForeignConfig:
        """The object under a key; empty if the key is missing."""
        value = self._get(key, {})
        if not isinstance(value, dict):
            raise self.refuse(key, "an object")
        return ForeignConfig(value, self.name, f"{key}.")

    def unread(self) -> list[str]:
        """The keys that have not been read and are not known to be harmless."""
        return sorted(key for key in self.values if key not in self._read and key not in HARMLESS)


def refuse_own_code(config: ForeignConfig) -> None:
    """Raises ForeignConfigError for a model that brings its own code or is quantized."""
    for key, reason in (
        ("auto_map", "the model brings its own code, which is never run"),
        ("quantization_config", "its weights are quantized"),
    ):
        config.skip(key)
        if config.values.get(key):
            raise config.refuse(key, f"none: {reason}")


def rope_settings(config: ForeignConfig, context: int) -> dict[str, Any]:
    """Our settings for rotary positions, from the keys of transformers before release 5 or since.

    Args:
        context: max_position_embeddings.
    """
    newer, older = config.values.get("rope_parameters"), config.values.get("rope_scaling")
    if newer and older and newer != older:
        raise config.refuse("rope_scaling", "the same as rope_parameters, or one of the two")
    key = "rope_parameters" if newer else "rope_scaling"
    config.skip("rope_parameters", "rope_scaling")
    rope = config.part(key)
    kind = rope.choice(
        "rope_type" if "rope_type" in rope.values else "type", {name: name for name in ROPE_TYPES}, "default"
    )
    rope.skip("type", "rope_type")
    theta = rope.number("rope_theta", config.number("rope_theta", 10000.0))
    rope.only("partial_rotary_factor", 1.0, 1)
    config.only("partial_rotary_factor", 1.0, 1)
    settings: dict[str, Any] = {"position": "rope", "rope_theta": theta}
    if kind == "default":
        rope.skip("factor", "original_max_position_embeddings")
    else:
        settings |= {"rope_scaling": kind, "rope_factor": rope.number("factor")}
    if kind == "linear":
        rope.skip("original_max_position_embeddings")
    if kind == "llama3":
        settings["rope_original_context"] = rope.integer("original_max_position_embeddings")
        settings["rope_low_freq"] = rope.number("low_freq_factor")
        settings["rope_high_freq"] = rope.number("high_freq_factor")
    if kind == "yarn":
        settings["rope_original_context"] = rope.integer("original_max_position_embeddings", context)
        settings["rope_low_freq"] = rope.number("beta_slow", 1.0)
        settings["rope_high_freq"] = rope.number("beta_fast", 32.0)
        usual = 0.1 * math.log(settings["rope_factor"]) + 1 if settings["rope_factor"] >= 1 else 1.0
        if abs(rope.number("attention_factor", usual) - usual) > 1e-6:
            raise rope.refuse("attention_factor", f"{number_text(usual)}, which follows from factor")
        rope.only("truncate", True)
    if unread := rope.unread():
        raise ForeignConfigError(f"{config.name}: {key}.{unread[0]}: unknown, so our numbers might differ")
    return settings


def rope_keys(config: ModelConfig) -> dict[str, Any]:
    """The keys for rotary positions in config.json, in the form that all releases of transformers read."""
    scaling: dict[str, Any] | None = None
    if config.rope_scaling != "none":
        scaling = {"rope_type": config.rope_scaling, "factor": config.rope_factor}
    if scaling and config.rope_scaling == "llama3":
        scaling |= {"low_freq_factor": config.rope_low_freq, "high_freq_factor": config.rope_high_freq}
    if scaling and config.rope_scaling == "yarn":
        scaling |= {"beta_slow": config.rope_low_freq, "beta_fast": config.rope_high_freq}
    if scaling and config.rope_original_context is not None:
        scaling["original_max_position_embeddings"] = config.rope_original_context
    return {"rope_theta": config.rope_theta, "rope_scaling": scaling}


def sliding_window(config: ForeignConfig) -> int | None:
    """The window that transformers would use: 4096 if the key is missing, none if it is null."""
    return config.optional_integer("sliding_window") if "sliding_window" in config.values else 4096


def layer_windows(config: ForeignConfig, n_layer: int) -> dict[str, Any]:
    """Our settings for a sliding window, for families in which only later blocks may have one."""
    uses, window = config.flag("use_sliding_window", False), sliding_window(config)
    config.skip("max_window_layers", "layer_types")
    first = config.values.get("max_window_layers", 28)
    if type(first) is not int or first < 0:
        raise config.refuse("max_window_layers", "a whole number >= 0")
    first = min(first, n_layer)
    kinds = config.values.get("layer_types")
    if not uses or window is None:
        if kinds is not None and set(_listed(config, kinds)) - {"full_attention"}:
            raise config.refuse("layer_types", "full_attention only, because use_sliding_window is off")
        return {}
    if kinds is not None:
        names = _listed(config, kinds)
        first = names.index("sliding_attention") if "sliding_attention" in names else n_layer
        if names != ["full_attention"] * first + ["sliding_attention"] * (n_layer - first):
            raise config.refuse("layer_types", f"{n_layer} names, full_attention before sliding_attention")
    return {"sliding_window": window, "full_attention_layers": first} if first < n_layer else {}


def _listed(config: ForeignConfig, kinds: Any) -> list[str]:
    if not isinstance(kinds, list) or not all(isinstance(kind, str) for kind in kinds):
        raise config.refuse("layer_types", "a list of names")
    return kinds


def our_config(settings: Mapping[str, Any], name: str) -> ModelConfig:
    """The architecture that our settings describe.

    Args:
        name: the file, for messages.

    Raises:
        ForeignConfigError: a value is outside the bounds of our settings.
    """
    from pydantic import ValidationError

    try:
        return ModelConfig.model_validate(settings)
    except ValidationError as error:
        detail = error.errors(include_url=False)[0]
        key = str(detail["loc"][0]) if detail["loc"] else ""
        value = f", got {shown(settings.get(key))}" if key else ""
        raise ForeignConfigError(f"{name}: {key or 'the model'}: {detail['msg']}{value}") from None
