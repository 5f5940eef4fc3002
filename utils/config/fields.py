"""Settings by their flat names: sections, accepted values, current values, the config hash and the JSON schema."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from typing import Any, Literal, get_args, get_origin

from pydantic.fields import FieldInfo

from utils.config.section import TRAJECTORY, Section
from utils.config.settings import TOKENIZERS, Config, warmup_steps

SECTIONS: dict[str, type[Section]] = {
    name: field.annotation
    for name, field in Config.model_fields.items()
    if isinstance(field.annotation, type) and issubclass(field.annotation, Section)
}


def iter_fields() -> Iterator[tuple[str, str, FieldInfo]]:
    """Yield (section, key, field) for every setting, in the order of settings.py."""
    for section, model in SECTIONS.items():
        for key, field in model.model_fields.items():
            yield section, key, field


FIELDS: dict[str, FieldInfo] = {key: field for _, key, field in iter_fields()}

SECTION_OF: dict[str, str] = {key: section for section, key, _ in iter_fields()}
assert len(FIELDS) == sum(len(model.model_fields) for model in SECTIONS.values()), "leaf names are unique"
assert not FIELDS.keys() & SECTIONS.keys(), "no setting is named like a section"

# Settings that older runs do not have. At their defaults they change nothing, so the config hash leaves them out.
ADDED = {
    *("packing", "loss_after"),
    *("rope_scaling", "rope_factor", "rope_original_context", "rope_low_freq", "rope_high_freq"),
    *("sliding_window", "full_attention_layers", "mlp_bias", "head_bias", "qk_norm_weights"),
    *(key for key, section in SECTION_OF.items() if section == "arithmetic"),
    *("lora_rank", "lora_alpha", "lora_dropout", "lora_targets"),
    *("lanes", "shard"),
}


def field_fact(key: str, fact: Literal["kind", "unit"]) -> str:
    extra = FIELDS[key].json_schema_extra
    assert isinstance(extra, dict)
    return str(extra[fact])


def expected(key: str) -> str:
    """Describe the accepted values of `key`, e.g. "integer >= 1" or "gelu, gelu_tanh, relu2 or swiglu"."""
    field = FIELDS[key]
    if key == "device":
        return "auto, cpu, cuda, cuda:N or mps"
    if key == "tokenizer":
        return f"{', '.join(TOKENIZERS)} or hf:PATH"
    members = [member for member in get_args(field.annotation) or (field.annotation,)]
    if get_origin(field.annotation) is Literal:
        return f"{', '.join(members[:-1])} or {members[-1]}" if len(members) > 1 else str(members[0])
    if get_origin(field.annotation) is tuple:
        if key == "callbacks":
            return 'list of names module:Class (in a file: ["smooth_loss:SmoothLoss"])'
        if get_args(field.annotation)[0] is str:
            return "list of names (in a file: [wide, long])"
        return "list of integers >= 1 (in a file: [1024, 512])"
    names = {int: "integer", float: "number", bool: "true or false", str: "text", type(None): "none"}
    bounds = []
    of_members = [fact for member in members for fact in getattr(member, "__metadata__", ())]
    for constraint in (*field.metadata, *(c for fact in of_members for c in getattr(fact, "metadata", [fact]))):
        for attribute, sign in (("ge", ">="), ("gt", ">"), ("le", "<="), ("lt", "<")):
            if (bound := getattr(constraint, attribute, None)) is not None:
                bounds.append(f"{sign} {bound}")
    lengths = {
        name: getattr(c, name) for c in field.metadata for name in ("min_length", "max_length") if hasattr(c, name)
    }
    if lengths:
        bounds.append("of one character" if lengths.get("max_length") == 1 else "that is not empty")
    words = [
        "/".join(get_args(member)) if get_origin(member) is Literal else names[getattr(member, "__origin__", member)]
        for member in members
    ]
    return " or ".join([" ".join([words[0], " and ".join(bounds)]).strip(), *words[1:]])


def get_value(config: Config, key: str) -> Any:
    return getattr(getattr(config, SECTION_OF[key]), key)


def flat(config: Config) -> dict[str, Any]:
    """All settings of `config` by leaf name."""
    return {key: get_value(config, key) for key in FIELDS}


def derived_settings(config: Config, max_iters: int) -> dict[str, Any]:
    """The values that settings left at none, and alternatives like epochs, resolve to in a run of `max_iters` steps."""
    model, optimizer = config.model, config.optimizer
    return {
        **model.derived,
        "min_lr": optimizer.final_lr,
        "warmup_iters": warmup_steps(optimizer, max_iters),
        "lr_decay_iters": optimizer.lr_decay_iters or max_iters,
        "max_iters": max_iters,
        "epochs": None,
        "tokens_per_step": config.train.sequences * model.block_size,
        **({"lora_alpha": optimizer.adapter_alpha} if optimizer.lora_rank is not None else {}),
    }


def config_hash(config: Config, resolved: dict[str, Any]) -> str:
    """SHA-256 of everything that determines the numbers of a run.

    Args:
        config: the merged configuration.
        resolved: the values that "auto" and none resolved to (device type, dtype, threads, derived settings), and
            the hashes of corpus and tokenizer; each replaces the setting of the same name.
    """
    values = {key: value for key, value in flat(config).items() if field_fact(key, "kind") == TRAJECTORY}
    values = {key: value for key, value in values.items() if key not in ADDED or value != FIELDS[key].default}
    text = json.dumps(values | resolved, sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()


def json_schema() -> dict[str, Any]:
    """The JSON schema of a file in configs/, which may be sectioned or flat; every key is optional."""
    schema = Config.model_json_schema()
    flat_properties = {key: schema["$defs"][SECTIONS[SECTION_OF[key]].__name__]["properties"][key] for key in FIELDS}
    schema["properties"] = {**schema["properties"], **flat_properties}
    for described in (schema, *schema["$defs"].values()):
        described["description"] = described["description"].partition("\n")[0]  # without the docstring's example
    schema["title"] = "Experiment configuration"
    schema["$schema"] = "https://json-schema.org/draft/2020-12/schema"
    return schema


if __name__ == "__main__":  # make schema
    print(json.dumps(json_schema(), indent=2))
