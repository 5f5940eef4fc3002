"""Merge layers of settings into one validated Config, with the source of every value.

Priority, highest first: command line > `--config FILE` (later wins) > configs/*.yaml|yml|json >
legacy config.json > defaults. For every key the loader keeps each layer that set it, with file and line, so
that a mistake can be located and a value explained.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, get_args, get_origin

from pydantic import ValidationError
from pydantic_core import ErrorDetails

from utils.config.fields import FIELDS, SECTION_OF, SECTIONS, expected, flat
from utils.config.legacy import NO_COUNTERPART, RENAMED, ignored_line
from utils.config.parse import CONFIG_SUFFIXES, ConfigError, parse_file
from utils.config.section import RuleError, Section
from utils.config.settings import Config
from utils.errors import SHOWN, cut, nearest, shown
from utils.files import open_regular, real_path

ALTERNATIVES = (("max_iters", "epochs"),)  # setting one of a pair in a higher layer clears the other
CLEANING = "cleaning"  # files of configs/ with this prefix are for prepare.py and contain no settings
CODE = "code"  # the source of a setting that was given in Python
NONE_WORDS = ("none", "null")  # text that means "no value"
RECORDED = "full_config.json"  # the configuration that a run has recorded, perhaps with sections of an older version
MOVED_FROM = {"qa_template": "tracking", "qa_stop": "tracking"}  # setting -> its section in older versions


@dataclass(frozen=True)
class Setting:
    """The value of one key in one layer."""

    value: Any
    source: str  # "configs/train.yaml:7", "--batch-size", "code" or "default"


@dataclass(frozen=True)
class LoadedConfig:
    """A validated configuration and the source of each value.

    layers: key -> its values in all layers, lowest priority first.
    ignored: one line for each name in a legacy config.json that has no counterpart.
    """

    config: Config
    layers: dict[str, list[Setting]] = field(default_factory=dict)
    ignored: tuple[str, ...] = ()

    @classmethod
    def from_config(cls, config: Config) -> LoadedConfig:
        """Wrap a Config created in Python; values that differ from the defaults get the source "code"."""
        layers = _default_layers()
        for key, value in flat(config).items():
            if value != layers[key][0].value:
                layers[key].append(Setting(value, CODE))
        return cls(config, layers)

    def source(self, key: str) -> str:
        return self.layers[key][-1].source

    def non_default(self) -> list[tuple[str, Any, str]]:
        """List (key, value, source) for every setting that differs from its default."""
        default = flat(Config())
        return [(key, value, self.source(key)) for key, value in flat(self.config).items() if value != default[key]]

    def sources_json(self) -> dict[str, Any]:
        """The content of meta/config_sources.json."""
        dumped = self.config.model_dump(mode="json")
        return {
            key: {
                "value": dumped[SECTION_OF[key]][key],
                "source": layers[-1].source,
                "shadowed": [{"value": s.value, "source": s.source} for s in reversed(layers[:-1])],
            }
            for key, layers in self.layers.items()
        }


def config_files(loaded: LoadedConfig) -> set[str]:
    """The names of the files that settings come from, as `relative_name` returns them."""
    sources = (setting.source for layers in loaded.layers.values() for setting in layers)
    return {name for name in (source.rpartition(":")[0] for source in sources) if name.endswith(CONFIG_SUFFIXES)}


def relative_name(path: Path, root: Path) -> str:
    """`path` relative to `root` if it is inside, otherwise unchanged."""
    try:
        return real_path(path).relative_to(real_path(root)).as_posix()
    except ValueError:
        return str(path)


def read_config_file(path: Path, name: str, ignored: list[str] | None = None) -> dict[str, Setting]:
    """Read the settings of one file, flat or sectioned, by leaf name.

    Args:
        path: a .yaml, .yml or .json file. In the recorded configuration of a run, settings may be in older sections.
        name: the file's name in messages and sources.
        ignored: if given, the names of other programs are accepted (utils/config/legacy.py), and this list gets a line
            for each name without counterpart; otherwise such names are mistakes.

    Raises:
        ConfigError: the file is unreadable or malformed, or has a key that is unknown, in the wrong section or set
            twice.
    """
    if path.suffix not in CONFIG_SUFFIXES:
        raise ConfigError(f"{name}: expected a file that ends in {', '.join(CONFIG_SUFFIXES)}")
    document, lines = parse_file(path, name)
    if document is None:  # an empty file sets nothing
        return {}
    if not isinstance(document, dict):
        raise ConfigError(f"{name}:1: expected a mapping of settings, got a {type(document).__name__}")
    settings: dict[str, Setting] = {}
    unknown: list[str] = []

    def take(key: str, value: Any, line: int) -> None:
        if key in settings:
            raise ConfigError(f"{name}:{line}: {key} is set twice in this file (also at {settings[key].source})")
        if not isinstance(value, str | int | float | list | None):  # YAML has dates, bytes and sets as well
            raise ConfigError(f"{name}:{line}: {key}: expected {expected(key)}, got a {type(value).__name__}")
        none = is_none(key, value) and path.name != RECORDED  # a recorded "none" is text: no value is null there
        settings[key] = Setting(None if none else value, f"{name}:{line}")

    for key, value in document.items():
        line = lines[id(document)][key]
        if key in SECTIONS:
            if value is not None and not isinstance(value, dict):
                raise ConfigError(f"{name}:{line}: section {key}: expected a mapping, got {shown(value)}")
            for leaf, leaf_value in (value or {}).items():
                leaf_line = lines[id(value)][leaf]
                if SECTION_OF.get(leaf) != key and not (path.name == RECORDED and MOVED_FROM.get(leaf) == key):
                    raise ConfigError(f"{name}:{leaf_line}: {unknown_key(leaf, key)}")
                take(leaf, leaf_value, leaf_line)
        elif key in FIELDS:
            take(key, value, line)
        elif ignored is not None and key in RENAMED:
            take(RENAMED[key], value, line)
        elif ignored is not None and key in NO_COUNTERPART:
            ignored.append(f"{name}:{line}: {ignored_line(key)}")
        else:
            unknown.append(f"{name}:{line}: {unknown_key(key)}")
    if unknown:
        raise ConfigError("\n".join(unknown))
    return settings


def unknown_key(key: str, section: str | None = None) -> str:
    """The message for a name that is not a setting, or not one of its section, with the nearest valid name."""
    if section and key in SECTION_OF:
        return f"{key} belongs to section {SECTION_OF[key]}, not {section}"
    if section:
        return f"unknown key {cut(key, SHOWN)} in section {section}{nearest(key, SECTIONS[section].model_fields)}"
    if key in RENAMED:
        return f"unknown key {key}; did you mean {RENAMED[key]}?"
    return f"unknown key {cut(key, SHOWN)}{nearest(key, [*FIELDS, *SECTIONS])}"


def is_none(key: str, value: Any) -> bool:
    """Whether `value` is text that means "no value" for this setting."""
    optional = type(None) in getattr(FIELDS[key].annotation, "__args__", ())
    return optional and isinstance(value, str) and value.lower() in NONE_WORDS


def _from_flag(key: str, text: str) -> Any:
    """Convert the text after a flag to a value that pydantic can validate."""
    if is_none(key, text):
        return None
    if get_origin(FIELDS[key].annotation) is tuple:
        return [part.strip() for part in text.split(",") if part.strip()]
    return text


def from_code(key: str, value: Any) -> Any:
    """Convert a value given in Python to one that JSON can record: paths to text, numbers and arrays of NumPy and torch
    to numbers and lists, iterables to lists.
    """
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    if hasattr(value, "tolist"):  # NumPy and torch: returns a number or a list
        return value.tolist()
    if isinstance(value, Iterable) and not isinstance(value, str | bytes | Mapping):
        return [from_code(key, item) for item in value]
    return None if is_none(key, value) else value


class ConfigLoader:
    """Merges the layers of one project folder.

    Args:
        root: the folder that contains train.py; default paths and names in messages are relative to it.
        config_dir: folder of the shared files, root/configs by default.
    """

    def __init__(self, root: Path, config_dir: Path | None = None) -> None:
        self.root = root
        self.config_dir = config_dir
        if config_dir is not None and not config_dir.is_dir():
            raise ConfigError(f"--config-dir {config_dir}: no such folder")

    def load(self, files: Iterable[Path] = (), overrides: Mapping[str, str | bool] | None = None) -> LoadedConfig:
        """Merge and validate all layers.

        Args:
            files: `--config` files, lowest priority first.
            overrides: values from the command line by leaf name.

        Raises:
            ConfigError: one line for each mistake, with its place and the nearest valid name.
        """
        ignored: list[str] = []
        layers = [*self._file_layers(ignored), *self._own_layers(files, overrides or {})]
        return replace(_merge(_default_layers(), layers), ignored=tuple(ignored))

    def load_only(self, path: Path) -> LoadedConfig:
        """Load one regular file of a run on top of the built-in defaults, without configs/.

        Raises:
            ConfigError: as for `load`.
        """
        try:
            open_regular(path, path.parent.parent).close()
        except FileNotFoundError:
            pass  # reported below, with the nearest name
        except OSError as error:
            raise ConfigError(f"{relative_name(path, self.root)}: cannot be read: {error.strerror}") from None
        return _merge(_default_layers(), [read_config_file(path, relative_name(path, self.root))])

    def load_onto(
        self, base: LoadedConfig, files: Iterable[Path] = (), overrides: Mapping[str, str | bool] | None = None
    ) -> LoadedConfig:
        """Like `load`, but with `base` instead of the defaults and configs/.

        Raises:
            ConfigError: as for `load`.
        """
        layers = {key: list(settings) for key, settings in base.layers.items()}
        return _merge(layers, self._own_layers(files, overrides or {}))

    def put_layer(self, base: LoadedConfig, layer: Mapping[str, Setting]) -> LoadedConfig:
        """`base` with one more layer on top.

        Raises:
            ConfigError: as for `load`.
        """
        return _merge({key: list(settings) for key, settings in base.layers.items()}, [dict(layer)])

    def load_code(self, settings: Mapping[str, Any], base: LoadedConfig | None = None) -> LoadedConfig:
        """Merge settings given in Python, flat or by section, on top of `base`, or of the defaults and configs/.

        Raises:
            ConfigError: as for `load`.
        """
        layer: dict[str, Setting] = {}
        for name, value in settings.items():
            section = name if name in SECTIONS else None
            if section and not isinstance(value, Mapping):
                raise ConfigError(f"section {section}: expected a mapping, got {shown(value)}")
            for key, leaf in value.items() if section else [(name, value)]:
                if key not in FIELDS or section not in (None, SECTION_OF[key]):
                    raise ConfigError(unknown_key(str(key), section))
                if key in layer:
                    raise ConfigError(f"{key} is set twice")
                layer[key] = Setting(from_code(key, leaf), CODE)
        if base is None:
            return _merge(_default_layers(), [*self._file_layers([]), layer])
        return self.put_layer(base, layer)

    @property
    def _folder(self) -> Path:
        return self.config_dir or self.root / "configs"

    def _file_layers(self, ignored: list[str]) -> Iterator[dict[str, Setting]]:
        legacy, shared = self.root / "config.json", self._shared_layer()
        if legacy.is_file():
            name = relative_name(legacy, self.root)
            settings = read_config_file(legacy, name, ignored)
            if hidden := [key for key, setting in settings.items() if _hides(shared, key, setting.value)]:
                folder = relative_name(self._folder, self.root)
                ignored.append(f"{name}: {', '.join(hidden)}: not used, as files in {folder} set something else")
            yield settings
        yield shared

    def _own_layers(self, files: Iterable[Path], overrides: Mapping[str, str | bool]) -> Iterator[dict[str, Setting]]:
        for path in files:
            yield read_config_file(path, relative_name(path, self.root))
        yield {
            key: Setting(_from_flag(key, value) if isinstance(value, str) else value, flag_name(key, value))
            for key, value in overrides.items()
        }

    def _shared_layer(self) -> dict[str, Setting]:
        """The settings of all files in the configuration folder, as one layer: each key may be set only once."""
        layer: dict[str, Setting] = {}
        files = [
            p for p in self._folder.glob("[!.]*") if p.suffix in CONFIG_SUFFIXES and not p.name.startswith(CLEANING)
        ]
        for path in sorted(files):
            for key, setting in read_config_file(path, relative_name(path, self.root)).items():
                if key in layer:
                    raise ConfigError(f"{setting.source}: {key} is also set in {layer[key].source}: keep one of them")
                layer[key] = setting
        return layer


def _hides(layer: Mapping[str, Setting], key: str, value: Any) -> bool:
    """Whether a layer above replaces this value of a setting by another one, or by an alternative to the setting."""
    if key in layer:
        return bool(layer[key].value != value)
    return any(other in layer for pair in ALTERNATIVES if key in pair for other in pair)


def _default_layers() -> dict[str, list[Setting]]:
    return {key: [Setting(value, "default")] for key, value in flat(Config()).items()}


def _merge(layers: dict[str, list[Setting]], further: Iterable[dict[str, Setting]]) -> LoadedConfig:
    """Put the layers `further`, lowest priority first, on top of `layers`, in place, and validate the result."""
    for layer in further:
        check_values(layer)
        for pair in ALTERNATIVES:
            given = [key for key in pair if key in layer and layer[key].value is not None]
            if len(given) == 1:
                (other,) = set(pair) - set(given)
                layer.setdefault(other, Setting(None, layer[given[0]].source))
        _settle_batch_size(layer, layers)
        for key, setting in layer.items():
            layers[key].append(setting)
    return LoadedConfig(_validate(layers), layers)


def _settle_batch_size(layer: dict[str, Setting], below: Mapping[str, list[Setting]]) -> None:
    """Add to `layer` what its batch_size or tokens_per_step implies for the settings in the layers below.

    tokens_per_step alone implies batch_size auto. A number as batch_size clears tokens_per_step below it, and auto
    resets gradient_accumulation_steps to 1.
    """
    tokens = layer.get("tokens_per_step")
    if tokens is not None and tokens.value is not None:
        layer.setdefault("batch_size", Setting("auto", tokens.source))
    if (batch_size := layer.get("batch_size")) is not None:
        key, value = ("gradient_accumulation_steps", 1) if batch_size.value == "auto" else ("tokens_per_step", None)
        if below[key][-1].value != value:
            layer.setdefault(key, Setting(value, batch_size.source))


def load_layer(layer: dict[str, Setting]) -> LoadedConfig:
    """Put one layer of settings on top of the built-in defaults and validate the result.

    Raises:
        ConfigError: one line for each mistake, with its source.
    """
    return _merge(_default_layers(), [layer])


def flag_name(key: str, value: Any = None) -> str:
    """The flag of a setting: `--batch-size` for batch_size, `--no-...` for a switch that is off."""
    return ("--no-" if value is False else "--") + key.replace("_", "-")


def check_values(layer: Mapping[str, Setting]) -> None:
    """Raise ConfigError unless each value of a layer is valid on its own, even if a higher layer overrides it."""
    mistakes = []
    for key, setting in layer.items():
        try:
            SECTIONS[SECTION_OF[key]].model_validate({key: setting.value})
        except ValidationError as error:  # rules between settings (no "loc") are checked on the merged configuration
            details = [d for d in error.errors(include_url=False) if d["loc"]][:1]
            mistakes += [_explain({**d, "loc": (SECTION_OF[key], key)}, {key: [setting]}) for d in details]
    if mistakes:
        raise ConfigError("\n".join(mistakes))


def _validate(layers: dict[str, list[Setting]]) -> Config:
    merged: dict[str, dict[str, Any]] = {section: {} for section in SECTIONS}
    for key, settings in layers.items():
        merged[SECTION_OF[key]][key] = settings[-1].value
    try:
        return Config.model_validate(merged)
    except ValidationError as error:
        raise ConfigError("\n".join(_explain(detail, layers) for detail in _by_key(error))) from None


def _by_key(error: ValidationError) -> list[ErrorDetails]:
    """The first error of each key, because pydantic reports one for every member of a union type."""
    seen: dict[tuple[int | str, ...], ErrorDetails] = {}
    for detail in error.errors(include_url=False):
        seen.setdefault(detail["loc"][:2], detail)
    return list(seen.values())


def _explain(detail: ErrorDetails, layers: dict[str, list[Setting]]) -> str:
    """Describe a mistake in one line: its place, the key, the expected and the given value."""
    cause = detail.get("ctx", {}).get("error")
    if isinstance(cause, RuleError):
        return f"{_set_last(cause, layers)}: {cause}"
    key = str(detail["loc"][1])
    setting = layers[key][-1]
    named = setting.source if setting.source.startswith("--") else f"{setting.source}: {key}"
    if detail["type"] == "value_error":
        return f"{named}: {cause}"
    hint = nearest(str(setting.value), get_args(FIELDS[key].annotation)) if detail["type"] == "literal_error" else ""
    return f"{named}: expected {expected(key)}, got {shown(setting.value)}{hint}"


def mistakes_in_code(kind: type[Section], error: ValidationError) -> str:
    """Describe the mistakes in a section or Config created in Python, one line each."""
    section = next((name for name, model in SECTIONS.items() if issubclass(kind, model)), None)
    lines: dict[object, str] = {}
    for detail in error.errors(include_url=False):
        place = detail["loc"] if section is None else (section, *detail["loc"])
        if place[:2] not in lines:  # pydantic reports every member of a union type
            lines[place[:2]] = _mistake_in_code({**detail, "loc": place})
    return "\n".join(lines.values())


def _mistake_in_code(detail: ErrorDetails) -> str:
    """Describe one mistake in one line. `loc` begins with the name of a section or an unknown name of a Config."""
    cause, (section, *keys) = detail.get("ctx", {}).get("error"), map(str, detail["loc"] or ("",))
    if isinstance(cause, RuleError):
        return str(cause)
    if detail["type"] == "extra_forbidden":
        if keys:
            return unknown_key(keys[0], section)
        return f"{section} belongs to section {SECTION_OF[section]}" if section in SECTION_OF else unknown_key(section)
    if not keys:
        kind = SECTIONS[section].__name__
        return f"section {section}: expected a {kind} or a mapping, got {shown(detail['input'])}"
    return _explain(detail, {keys[0]: [Setting(detail["input"], CODE)]})


def rule_error(error: RuleError, loaded: LoadedConfig) -> ConfigError:
    """The error for a rule found broken after loading, with the place of the setting to blame."""
    return ConfigError(f"{_set_last(error, loaded.layers)}: {error}")


def _set_last(error: RuleError, layers: Mapping[str, Sequence[Setting]]) -> str:
    """The source to blame for a broken rule: a flag before a file, then the key set in most layers, then the first."""
    found = [layers[key] for key in error.keys if layers[key][-1].source != "default"]
    found.sort(key=lambda settings: (not settings[-1].source.startswith("--"), -len(settings)))
    return found[0][-1].source if found else "default"
