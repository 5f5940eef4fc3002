"""YAML and JSON files of settings -> their document, with the line of each key."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import yaml

from utils.errors import SHOWN, UserError, cut, nearest, shown
from utils.files import read_named

CONFIG_SUFFIXES = (".yaml", ".yml", ".json")
CONFIG_BYTES = 1 << 20
CONFIG_VALUES = 10_000  # with every alias of YAML in full: a few lines of aliases can stand for billions
Lines = dict[int, dict[str, int]]  # id of a mapping -> key -> line; in YAML also id of a list -> number of item -> line


class ConfigError(UserError):
    """A configuration that cannot be used."""


def parse_file(path: Path, name: str) -> tuple[Any, Lines]:
    """The document of a file that ends in one of CONFIG_SUFFIXES, and the line of each key of its mappings.

    Args:
        name: its name in messages.

    Raises:
        ConfigError: it cannot be read, is malformed, or sets a key twice.
    """
    parse = _parse_json if path.suffix == ".json" else _parse_yaml
    return parse(_read_text(path, name), name)


def _read_text(path: Path, name: str) -> str:
    try:
        return read_named(path, CONFIG_BYTES).decode("utf-8-sig")  # some editors begin a file with a byte order mark
    except FileNotFoundError:
        siblings = [p.name for p in path.parent.glob("*") if p.suffix in CONFIG_SUFFIXES]
        raise ConfigError(f"{name}: no such configuration file{nearest(path.name, siblings)}") from None
    except UnicodeDecodeError as error:
        raise ConfigError(f"{name}: not UTF-8 text (byte {error.start})") from None
    except OSError as error:
        raise ConfigError(f"{name}: cannot be read: {error.strerror}") from None


class _UniqueKeyLoader(yaml.SafeLoader):
    """SafeLoader that records the line of each key and refuses a key that a mapping has twice."""

    lines: Lines

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        mapping: dict[Any, Any] = {}
        lines: dict[str, int] = {}
        for key_node, value_node in node.value:
            key = self.construct_object(key_node, deep=True)
            line = key_node.start_mark.line + 1
            if not isinstance(key, str):
                raise yaml.constructor.ConstructorError(
                    None, None, f"expected a name, not {shown(key)}", key_node.start_mark
                )
            if key in lines:
                raise yaml.constructor.ConstructorError(
                    None,
                    None,
                    f"{cut(key, SHOWN)} is set twice in this file (first in line {lines[key]})",
                    key_node.start_mark,
                )
            mapping[key] = self.construct_object(value_node, deep=True)
            lines[key] = line
        self.lines[id(mapping)] = lines
        return mapping


def _construct_sequence(loader: _UniqueKeyLoader, node: yaml.SequenceNode) -> list[Any]:
    """A list, with the line of each item under its number."""
    items = loader.construct_sequence(node, deep=True)
    loader.lines[id(items)] = {str(number): item.start_mark.line + 1 for number, item in enumerate(node.value)}
    return items


def _construct_text(loader: _UniqueKeyLoader, node: yaml.ScalarNode) -> str:
    """A date stays text: no setting is a date, and a tag may look like one."""
    return str(node.value)


def _construct_number(loader: _UniqueKeyLoader, node: yaml.ScalarNode) -> int | float | str:
    """A number as YAML 1.2 and flags read it: 0100 is not octal, and 1:30 is text, not a count of seconds."""
    text = str(node.value).replace("_", "")
    if ":" in text or text.lstrip("+-").startswith("0b"):
        return str(node.value)
    if text.lstrip("+-").startswith("0x"):
        return int(text, 16)
    try:
        return int(text)
    except ValueError:
        return float(loader.construct_yaml_float(node))


def _refuse_merge(loader: _UniqueKeyLoader, node: yaml.ScalarNode) -> None:
    problem = "<< is not supported: put what it merges into a file of its own (--config can be given several times)"
    raise yaml.constructor.ConstructorError(None, None, problem, node.start_mark)


def _construct_mapping(loader: _UniqueKeyLoader, node: yaml.MappingNode) -> dict[Any, Any]:
    return loader.construct_mapping(node, deep=True)


_UniqueKeyLoader.add_constructor("tag:yaml.org,2002:map", _construct_mapping)
_UniqueKeyLoader.add_constructor("tag:yaml.org,2002:seq", _construct_sequence)
_UniqueKeyLoader.add_constructor("tag:yaml.org,2002:timestamp", _construct_text)
_UniqueKeyLoader.add_constructor("tag:yaml.org,2002:int", _construct_number)
_UniqueKeyLoader.add_constructor("tag:yaml.org,2002:float", _construct_number)
_UniqueKeyLoader.add_constructor("tag:yaml.org,2002:merge", _refuse_merge)


def _count(node: yaml.Node, counts: dict[int, int]) -> int:
    """The number of values in a node, where an alias counts as all that it stands for.

    Args:
        counts: id of a node -> its number of values, of those that were counted before.

    Raises:
        ConstructorError: a node contains itself.
    """
    known = counts.get(id(node))
    if known == 0:
        raise yaml.constructor.ConstructorError(None, None, "an alias of what it is in", node.start_mark)
    if known is None:
        counts[id(node)] = 0  # until it is counted
        children = [] if isinstance(node, yaml.ScalarNode) else node.value
        parts = [part for child in children for part in (child if isinstance(child, tuple) else (child,))]
        known = counts[id(node)] = 1 + sum(_count(part, counts) for part in parts)
    return known


def _parse_yaml(text: str, name: str) -> tuple[Any, Lines]:
    """The document and, per mapping, the line of each key."""
    try:
        loader = _UniqueKeyLoader(text)
        loader.lines = {}
        node = loader.get_single_node()
        if node is None:
            return None, {}
        if _count(node, {}) > CONFIG_VALUES:
            raise ConfigError(f"{name}: more than {CONFIG_VALUES:,} values, each alias in full")
        return loader.construct_document(node), loader.lines
    except ConfigError:
        raise
    except yaml.constructor.ConstructorError as error:
        problem = (error.problem or "").replace("could not determine a constructor for the tag", "refused the YAML tag")
        line = error.problem_mark.line + 1 if error.problem_mark else 1
        raise ConfigError(f"{name}:{line}: {problem}") from None
    except yaml.MarkedYAMLError as error:
        line = error.problem_mark.line + 1 if error.problem_mark else 1
        problem = ", ".join(part for part in (error.context, error.problem) if part)
        raise ConfigError(f"{name}:{line}: not valid YAML: {problem}") from None
    except RecursionError:
        raise ConfigError(f"{name}: nested too deeply") from None
    except (yaml.YAMLError, ValueError) as error:  # ValueError: a number or date that Python cannot hold
        raise ConfigError(f"{name}: not valid YAML: {str(error).splitlines()[0]}") from None


def _parse_json(text: str, name: str) -> tuple[Any, Lines]:
    """Like `_parse_yaml`; the line of a key is the first one with its quoted name."""
    lines: Lines = {}

    def line_of(key: str) -> int:
        match = re.search(re.escape(json.dumps(key)) + r"\s*:", text)
        return text.count("\n", 0, match.start()) + 1 if match else 1

    def mapping(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        result: dict[str, Any] = {}
        for key, value in pairs:
            if key in result:
                raise ConfigError(f"{name}:{line_of(key)}: {cut(key, SHOWN)} is set twice in this file")
            result[key] = value
        lines[id(result)] = {key: line_of(key) for key in result}
        return result

    try:
        return json.loads(text, object_pairs_hook=mapping), lines
    except json.JSONDecodeError as error:
        raise ConfigError(f"{name}:{error.lineno}: not valid JSON: {error.msg}") from None
    except RecursionError:
        raise ConfigError(f"{name}: nested too deeply") from None
    except ConfigError:
        raise
    except ValueError as error:  # a number that Python cannot hold
        raise ConfigError(f"{name}: not valid JSON: {error}") from None
