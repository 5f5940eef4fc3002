"""Checks before a run starts from an earlier one: settings, length, callbacks, checkpoints and weights."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from utils.checkpoints.folder import list_checkpoints
from utils.config.fields import FIELDS, derived_settings, field_fact, flat
from utils.config.loader import ALTERNATIVES, ConfigError, ConfigLoader, LoadedConfig, flag_name
from utils.config.section import TRAJECTORY
from utils.config.settings import Config, ModelConfig, OptimizerConfig
from utils.runs.layout import CHECKPOINTS, CONFIG
from utils.runs.origin import Origin, recorded_config
from utils.runs.seal import checkpoints_are_gone
from utils.runs.trust import callback_words, require_trust
from utils.terminal.words import setting_text

# Settings in which a model may differ from the one whose weights it loads.
FREE_MODEL_SETTINGS = ("dropout", "rope_theta", "zero_init")


def check_overrides(run: Path, recorded: LoadedConfig, loaded: LoadedConfig, resolved: Mapping[str, Any]) -> None:
    """Raise ConfigError unless a run that was started with `recorded` may be resumed with `loaded`.

    Settings of the kinds observation and machine may differ, and max_iters as far as `check_longer` allows. Any other
    change would make it a different experiment.

    Args:
        resolved: the values that "auto" and none resolved to; giving the same value explicitly is not a change.
    """
    before, after = flat(recorded.config), flat(loaded.config)
    alternatives = {key for pair in ALTERNATIVES for key in pair}
    for key in FIELDS:
        if after[key] == before[key] or key in alternatives or field_fact(key, "kind") != TRAJECTORY:
            continue
        value = resolved.get(key) if before[key] in (None, "auto") else before[key]
        same_device_type = key == "device" and _device_type(after[key]) == _device_type(str(value))
        if after[key] == value or same_device_type:
            continue
        raise ConfigError(
            f"{loaded.source(key)}: {key} changes the numbers of a run, so {run.name} continues with "
            f"{setting_text(value)}, not {setting_text(after[key])}; --fork starts a new run from its checkpoint"
        )


def _device_type(device: str) -> str:
    return device.split(":")[0]


def check_callbacks(origin: Origin, loaded: LoadedConfig, loader: ConfigLoader) -> None:
    """Raise UserError if a resume or fork would run untrusted callbacks, named only by a run that was made elsewhere.

    Callbacks on the command line or in the files of this project are the user's own choice.

    Args:
        loaded: the configuration of the resume or fork.
    """
    recorded = recorded_config(origin.run, loader)
    if len(loaded.layers["callbacks"]) > len(recorded.layers["callbacks"]):  # given now, on top of the recorded ones
        return
    known = loader.load().config.train.callbacks
    named = [name for name in loaded.config.train.callbacks if name not in known]
    require_trust(origin.run, loader.root, callback_words(named), origin.trusted)


def check_longer(run: Path, record: Mapping[str, Any], config: Config, max_iters: int) -> None:
    """Raise ConfigError unless the run may be resumed and trained to step `max_iters`.

    A complete run must get more steps, no run may get fewer, and more steps must not change the learning rate or the
    weight decay of the steps already done.

    Args:
        record: run.json of the run.
        config: the configuration of the resumed run.
    """
    old, last_step = record.get("resolved") or {}, record.get("last_step") or 0
    if "max_iters" not in old:  # the run ended before its first step
        return
    complete = record["status"] == "completed"
    if complete and last_step < old["max_iters"]:
        raise ConfigError(f"{run.name} is complete: it stopped early at step {last_step:,}; --fork starts a new run")
    new = derived_settings(config, max_iters)
    grows = max_iters - old["max_iters"]
    if grows < 0:
        raise ConfigError(f"--max-iters: {run.name} may grow, not shrink, from {old['max_iters']:,} to {max_iters:,}")
    if grows == 0 and complete:
        newest = next((step for step, _ in list_checkpoints(run / CHECKPOINTS)), last_step)
        of_step = f" of step {newest:,}" if newest != last_step else ""  # for example, because the disk was full
        raise ConfigError(
            f"{run.name} is complete ({max_iters:,} steps); a larger --max-iters continues it if the schedule "
            f"allows that, --fork starts a new run from its checkpoint{of_step}"
        )
    if grows and config.optimizer.weight_decay and config.optimizer.weight_decay_schedule != "constant":
        raise ConfigError(
            f"--max-iters: {max_iters:,} steps would change the weight decay that {run.name} was trained with: its "
            f"schedule is {config.optimizer.weight_decay_schedule}; --fork starts a new run from its checkpoint"
        )
    decisive = ("warmup_iters",) if config.optimizer.schedule == "constant" else ("warmup_iters", "lr_decay_iters")
    for key in decisive:
        if old.get(key, new[key]) != new[key]:
            raise ConfigError(
                f"--max-iters: {max_iters:,} steps would change {key} from {old[key]:,} to {new[key]:,} and so the "
                f"learning rates that {run.name} was trained with; --fork starts a new run from its checkpoint"
            )


def check_checkpoints(run: Path, record: Mapping[str, Any]) -> None:
    """Raise ConfigError if a run ended with checkpoints and has none now: it would restart at step 0 and lose its log.

    Args:
        record: run.json of the run.
    """
    complete = record["status"] == "completed" and not list_checkpoints(run / CHECKPOINTS)
    if complete or checkpoints_are_gone(run):
        raise ConfigError(
            f"{run.name} no longer has checkpoints: it could only start again at step 0, and its log would be lost; "
            f"--config {run / CONFIG} starts a new run with its settings"
        )


def check_model(own: ModelConfig, parent: Mapping[str, Any], name: str) -> None:
    """Raise ConfigError unless a model can load the weights of another one.

    The message lists the settings that differ, and the flags that make them equal.

    Args:
        own: the architecture of the model.
        parent: the architecture of the weights, as recorded in the checkpoint.
        name: the run that the weights come from.
    """
    theirs = ModelConfig.model_validate(parent)
    differing = [
        key
        for key in differing_model_settings(own, theirs)
        # rotary positions have no weights, so any block_size fits
        if key not in FREE_MODEL_SETTINGS and not (key == "block_size" and own.position == theirs.position == "rope")
    ]
    if differing:
        values = [(key, getattr(theirs, key), getattr(own, key)) for key in differing]
        differences = ", ".join(f"{key} {setting_text(value)}, not {setting_text(ours)}" for key, value, ours in values)
        flags = " ".join(_flag(key, value) for key, value, _ in values)
        raise ConfigError(f"the weights of {name} are of another model: {differences}; fitting: {flags}")


def differing_model_settings(own: ModelConfig, theirs: ModelConfig) -> list[str]:
    """The settings in which two architectures differ; a setting that both derive from others is left out."""
    return [
        key
        for key in ModelConfig.model_fields
        if own.derived.get(key, getattr(own, key)) != theirs.derived.get(key, getattr(theirs, key))
        and not (getattr(own, key) is None and getattr(theirs, key) is None)
    ]


def _flag(key: str, value: Any) -> str:
    return flag_name(key, value) if isinstance(value, bool) else f"{flag_name(key)} {setting_text(value)}"


def check_fork(own: OptimizerConfig, state: Mapping[str, Any], name: str) -> None:
    """Raise ConfigError unless a fork has the same adapters as its parent, or neither has any.

    Args:
        state: the state of the parent's checkpoint.
        name: the parent run.
    """
    before, now = (
        {"lora_rank": s.lora_rank, "lora_alpha": s.adapter_alpha, "lora_targets": s.lora_targets} if s.lora_rank else {}
        for s in (OptimizerConfig.model_validate(state.get("lora", {})), own)
    )
    for key in before | now:
        if before.get(key) != now.get(key):
            raise ConfigError(
                f"--fork: {name} was trained with {key} {setting_text(before.get(key))}, not "
                f"{setting_text(now.get(key))}; --init-from starts with its weights, adapters merged into them"
            )
