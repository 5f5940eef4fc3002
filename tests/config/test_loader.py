"""Layers of settings: their priority, the source of each value, and one line for every mistake."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from utils.config.fields import FIELDS, flat
from utils.config.loader import (
    ConfigError,
    ConfigLoader,
    LoadedConfig,
    Setting,
    config_files,
    load_layer,
    read_config_file,
    rule_error,
)
from utils.config.section import RuleError
from utils.config.settings import Config, ModelConfig, TrainConfig
from utils.errors import UserError, nearest

ROOT = Path(__file__).resolve().parents[2]
Write = Callable[..., Path]


@pytest.fixture
def project(tmp_path: Path) -> Path:
    """A project folder with an empty configs/."""
    (tmp_path / "project" / "configs").mkdir(parents=True)
    return tmp_path / "project"


@pytest.fixture
def write(project: Path) -> Write:
    """Write a file below the project folder."""

    def write_file(name: str, content: str | bytes) -> Path:
        path = project / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content if isinstance(content, bytes) else content.encode("utf-8"))
        return path

    return write_file


def refusal(project: Path, *files: Path, **overrides: str | bool) -> str:
    """The one-line message that refuses the configuration."""
    with pytest.raises(ConfigError) as caught:
        ConfigLoader(project).load(files, overrides)
    message = str(caught.value)
    assert "\n" not in message
    return message


def test_each_layer_beats_those_below_and_all_are_kept(project: Path, write: Write) -> None:
    keys = ("seed", "n_layer", "n_head", "batch_size", "eval_iters")  # keys[i] is set by all but the i highest layers
    write("config.json", json.dumps({key: 2 for key in keys}))
    write("configs/a.yaml", "# shared\n" + "".join(f"{key}: 4\n" for key in keys[1:]))
    first = write("first.yaml", "".join(f"{key}: 8\n" for key in keys[2:]))
    second = write("second.yaml", "".join(f"\n{key}: 16\n" for key in keys[3:]))
    loaded = ConfigLoader(project).load([first, second], {"eval_iters": "32"})

    assert [flat(loaded.config)[key] for key in keys] == [2, 4, 8, 16, 32]
    sources = ["config.json:1", "configs/a.yaml:2", "first.yaml:1", "second.yaml:2", "--eval-iters"]
    assert [loaded.source(key) for key in keys] == sources
    assert loaded.source("n_embd") == "default"
    entry = loaded.sources_json()["eval_iters"]
    assert entry == {
        "value": 32,
        "source": "--eval-iters",
        "shadowed": [
            {"value": 16, "source": "second.yaml:4"},
            {"value": 8, "source": "first.yaml:3"},
            {"value": 4, "source": "configs/a.yaml:5"},
            {"value": 2, "source": "config.json:1"},
            {"value": 20, "source": "default"},
        ],
    }


def test_sources_cover_every_setting_and_are_json(project: Path) -> None:
    sources = ConfigLoader(project).load().sources_json()
    assert set(sources) == set(FIELDS)
    assert json.loads(json.dumps(sources)) == sources


def test_non_default_lists_values_that_differ_with_their_source(project: Path, write: Write) -> None:
    write("configs/a.yaml", "n_layer: 2\nn_head: 4\n")  # n_head is the default
    loaded = ConfigLoader(project).load(overrides={"aim_logging": True, "deterministic": False})
    assert loaded.non_default() == [
        ("n_layer", 2, "configs/a.yaml:1"),
        ("deterministic", False, "--no-deterministic"),
        ("aim_logging", True, "--aim-logging"),
    ]


def test_without_files_all_settings_are_defaults(tmp_path: Path) -> None:
    assert ConfigLoader(tmp_path).load().config == Config()


@pytest.mark.parametrize(
    ("name", "content", "lines"),
    [
        ("flat.yaml", "# the model\nn_layer: 2\n\ndataset: shakespeare\n", (2, 4)),
        ("flat.yml", "n_layer: 2\ndataset: shakespeare", (1, 2)),
        ("sectioned.yaml", "model:\n  n_layer: 2\ndata:\n  # text\n  dataset: shakespeare\n", (2, 5)),
        ("mixed.yaml", "data: {dataset: shakespeare}\nn_layer: 2\ntrain:\n", (2, 1)),
        ("flat.json", '{\n  "n_layer": 2,\n  "dataset": "shakespeare"\n}', (2, 3)),
        ("sectioned.json", '{"model": {\n "n_layer": 2},\n\n"data": {"dataset": "shakespeare"}}', (2, 4)),
        ("crlf.yaml", "n_layer: 2\r\n\r\ndataset: shakespeare\r\n", (1, 3)),
    ],
)
def test_files_may_be_flat_or_sectioned_yaml_or_json(
    project: Path, write: Write, name: str, content: str, lines: tuple[int, int]
) -> None:
    loaded = ConfigLoader(project).load([write(name, content)])
    assert (loaded.config.model.n_layer, loaded.config.data.dataset) == (2, "shakespeare")
    assert (loaded.source("n_layer"), loaded.source("dataset")) == (f"{name}:{lines[0]}", f"{name}:{lines[1]}")


@pytest.mark.parametrize("content", ["", "# nothing\n", "{}", "train:\n", "---\n"])
def test_empty_files_set_nothing(project: Path, write: Write, content: str) -> None:
    assert ConfigLoader(project).load([write("empty.yaml", content)]).config == Config()


def test_a_flat_key_may_be_in_any_shared_file(project: Path, write: Write) -> None:
    write("configs/train.yaml", "aim_logging: true\nseed: 7\n")
    config = ConfigLoader(project).load().config
    assert (config.tracking.aim_logging, config.train.seed) == (True, 7)


def test_config_dir_replaces_configs(project: Path, write: Write, tmp_path: Path) -> None:
    write("configs/a.yaml", "n_layer: 2\n")
    other = tmp_path / "other"
    other.mkdir()
    (other / "b.yml").write_text("n_head: 2\n")
    loaded = ConfigLoader(project, other).load()
    assert (loaded.config.model.n_layer, loaded.config.model.n_head) == (4, 2)
    assert loaded.source("n_head") == f"{other}/b.yml:1"


def test_presets_and_other_suffixes_are_not_shared_files(project: Path, write: Write) -> None:
    write("configs/presets/a.yaml", "n_layer: 2\n")
    write("configs/notes.txt", "n_layer: 3\n")
    assert ConfigLoader(project).load().config == Config()


def test_json_files_in_the_shared_folder_are_read(project: Path, write: Write) -> None:
    write("configs/a.json", '{"n_layer": 3}')
    assert ConfigLoader(project).load().source("n_layer") == "configs/a.json:1"


def test_legacy_config_is_read_below_the_shared_files(project: Path, write: Write) -> None:
    legacy = {"batch_size": 8, "block_size": 32, "n_layer": 3, "learning_rate": 0.0003, "aim_logging": True}
    write("config.json", json.dumps(legacy, indent=4))
    write("configs/a.yaml", "n_layer: 2\n")
    loaded = ConfigLoader(project).load()
    values = flat(loaded.config)
    assert {key: values[key] for key in legacy} == {**legacy, "n_layer": 2}
    assert loaded.source("block_size") == "config.json:3"


@pytest.mark.parametrize(
    ("key", "text", "value"),
    [
        ("batch_size", "8", 8),
        ("batch_size", "auto", "auto"),
        ("learning_rate", "3e-4", 3e-4),
        ("min_lr", "none", None),
        ("threads", "NULL", None),
        ("run_tag", "None", None),
        ("note", "none", "none"),
        ("dataset", "a,b", "a,b"),
        ("tags", "a, b,,c ", ("a", "b", "c")),
        ("tags", "", ()),
        ("mlp", "swiglu", "swiglu"),
    ],
)
def test_text_of_a_flag_becomes_a_value(project: Path, key: str, text: str, value: Any) -> None:
    assert flat(ConfigLoader(project).load(overrides={key: text}).config)[key] == value


@pytest.mark.parametrize(
    ("text", "key", "value"),
    [
        ("max_iters: 0100", "max_iters", 100),  # 64 in YAML 1.1
        ("max_iters: +0_100", "max_iters", 100),
        ("max_iters: 0x40", "max_iters", 64),
        ("max_minutes: 07.5", "max_minutes", 7.5),
        ("max_minutes: none", "max_minutes", None),
        ("max_minutes: NONE", "max_minutes", None),
        ("note: none", "note", "none"),  # a text
        ("note: 1:30:00", "note", "1:30:00"),
    ],
)
def test_numbers_and_none_mean_the_same_in_yaml_as_in_flags(
    project: Path, write: Write, text: str, key: str, value: Any
) -> None:
    below = write("below.yaml", "max_minutes: 3\n")
    assert flat(ConfigLoader(project).load([below, write("a.yaml", text)]).config)[key] == value


@pytest.mark.parametrize("text", ["max_iters: 1:30:00", "max_iters: 0b11", "max_minutes: 1:30.5"])
def test_number_formats_of_yaml_1_1_are_refused(project: Path, write: Write, text: str) -> None:
    with pytest.raises(ConfigError, match=r"a\.yaml:1: max_\w+: expected"):
        ConfigLoader(project).load([write("a.yaml", text)])


@pytest.mark.parametrize(("name", "text"), [("a.yaml", "seed: 5"), ("a.json", '{"seed": 5}')])
def test_a_file_may_begin_with_a_byte_order_mark(project: Path, write: Write, name: str, text: str) -> None:
    assert ConfigLoader(project).load([write(name, f"\ufeff{text}")]).config.train.seed == 5


def test_yaml_reads_scientific_notation_without_a_dot(project: Path, write: Write) -> None:
    loaded = ConfigLoader(project).load([write("a.yaml", "learning_rate: 1e-4\n")])
    assert loaded.config.optimizer.learning_rate == 1e-4


@pytest.mark.parametrize(
    ("lower", "higher", "max_iters", "epochs"),
    [
        ("max_iters: 50", "epochs: 2", None, 2.0),
        ("epochs: 2", "max_iters: 50", 50, None),
        ("epochs: 2", "epochs: 3\nmax_iters: null", None, 3.0),
        ("seed: 1", "epochs: 2", None, 2.0),
        ("epochs: 2", "seed: 1", None, 2.0),
    ],
)
def test_epochs_and_max_iters_replace_each_other_in_a_higher_layer(
    project: Path, write: Write, lower: str, higher: str, max_iters: int | None, epochs: float | None
) -> None:
    write("configs/a.yaml", lower)
    train = ConfigLoader(project).load([write("b.yaml", higher)]).config.train
    assert (train.max_iters, train.epochs) == (max_iters, epochs)


@pytest.mark.parametrize(
    ("lower", "higher", "batch"),  # batch_size, gradient_accumulation_steps, tokens_per_step
    [
        ("batch_size: 12", "tokens_per_step: 640", ("auto", 1, 640)),
        ("batch_size: auto\ntokens_per_step: 640", "batch_size: 8", (8, 1, None)),
        ("batch_size: auto\ntokens_per_step: 640", "batch_size: auto", ("auto", 1, 640)),
        ("batch_size: auto\ntokens_per_step: 640", "tokens_per_step: null", ("auto", 1, None)),
        ("batch_size: 12\ngradient_accumulation_steps: 4", "batch_size: auto", ("auto", 1, None)),
        ("batch_size: 12\ngradient_accumulation_steps: 4", "tokens_per_step: 640", ("auto", 1, 640)),
        ("batch_size: 12\ngradient_accumulation_steps: 4", "batch_size: 8", (8, 4, None)),
        ("tokens_per_step: 640", "seed: 1", ("auto", 1, 640)),
    ],
)
def test_batch_size_and_tokens_per_step_replace_each_other_in_a_higher_layer(
    project: Path, write: Write, lower: str, higher: str, batch: tuple[Any, ...]
) -> None:
    write("configs/a.yaml", lower)
    train = ConfigLoader(project).load([write("b.yaml", higher)]).config.train
    assert (train.batch_size, train.gradient_accumulation_steps, train.tokens_per_step) == batch


def test_a_replaced_setting_names_the_place_that_replaced_it(project: Path, write: Write) -> None:
    write("configs/a.yaml", "batch_size: 12\ngradient_accumulation_steps: 4\n")
    loaded = ConfigLoader(project).load(overrides={"tokens_per_step": "640"})
    assert {loaded.source(key) for key in ("batch_size", "gradient_accumulation_steps")} == {"--tokens-per-step"}
    assert ConfigLoader(project).load(overrides={"batch_size": "8"}).source("tokens_per_step") == "default"


MULTIPLE = "must be a multiple of block_size"


@pytest.mark.parametrize(
    ("text", "overrides", "message"),
    [
        ("batch_size: auto\n", {"gradient_accumulation_steps": "4"}, "--gradient-accumulation-steps: batch_size auto"),
        ("gradient_accumulation_steps: 2\nbatch_size: auto\n", {}, "b.yaml:1: batch_size auto also chooses"),
        ("batch_size: 8\ntokens_per_step: 640\n", {}, "b.yaml:2: tokens_per_step (640) and batch_size (8) are"),
        ("tokens_per_step: 100\n", {}, f"b.yaml:1: tokens_per_step (100) {MULTIPLE} (64): 64 or 128"),
        ("tokens_per_step: 64\n", {"block_size": "100"}, f"--block-size: tokens_per_step (64) {MULTIPLE} (100): 100"),
    ],
)
def test_conflicting_batch_settings_are_refused_with_their_place(
    project: Path, write: Write, text: str, overrides: dict[str, str], message: str
) -> None:
    with pytest.raises(ConfigError) as caught:
        ConfigLoader(project).load([write("b.yaml", text)], overrides)
    assert str(caught.value).startswith(message)


def test_epochs_as_a_flag_clear_max_iters_and_are_named_as_its_source(project: Path, write: Write) -> None:
    write("configs/a.yaml", "max_iters: 50")
    loaded = ConfigLoader(project).load(overrides={"epochs": "2"})
    assert loaded.config.train.max_iters is None
    assert loaded.source("max_iters") == "--epochs"


def test_dumped_config_reloads_as_the_same_experiment(project: Path, write: Write) -> None:
    write("configs/a.yaml", "seed: 99\nmax_iters: 10\n")
    config = Config.model_validate(
        {
            "train": {"max_iters": None, "epochs": 0.1 + 0.2},
            "model": {"n_layer": 2, "position": "rope"},
            "data": {"dataset": "über.txt", "unknown_token": "?"},
            "tracking": {"tags": ["a", "b"], "run_tag": "x", "note": 'says "hi"\n'},
        }
    )
    full = write("full_config.json", json.dumps(config.model_dump(mode="json"), indent=2, ensure_ascii=False))
    loaded = ConfigLoader(project).load([full])
    assert loaded.config == config
    assert loaded.source("seed").startswith("full_config.json:")


@pytest.mark.parametrize("words", ["tracking:\n  qa_stop: a\n", "tracking:\n  qa_template: '{question}'\n"])
def test_a_setting_that_moved_is_reported_with_its_new_section(write: Write, project: Path, words: str) -> None:
    key = words.split()[1].rstrip(":")
    assert f"a.yaml:2: {key} belongs to section inference, not tracking" in refusal(project, write("a.yaml", words))


def test_recorded_configurations_may_have_settings_in_their_old_section(write: Write, project: Path) -> None:
    full = write("full_config.json", json.dumps({"tracking": {"qa_stop": "a", "note": "b"}, "seed": 7}))
    for loaded in (ConfigLoader(project).load([full]), ConfigLoader(project).load_only(full)):
        assert (loaded.config.inference.qa_stop, loaded.config.tracking.note, loaded.config.train.seed) == ("a", "b", 7)
    wrong = write("full_config.json", json.dumps({"train": {"qa_stop": "a"}}))
    assert "qa_stop belongs to section inference, not train" in refusal(project, wrong)


def test_the_source_of_settings_made_in_python_is_code() -> None:
    loaded = LoadedConfig.from_config(Config(model=ModelConfig(n_layer=2), train=TrainConfig(max_iters=None, epochs=1)))
    assert loaded.source("n_layer") == "code"
    assert loaded.source("n_head") == "default"
    assert loaded.non_default() == [("n_layer", 2, "code"), ("max_iters", None, "code"), ("epochs", 1.0, "code")]


SHARED_FILES = sorted(ROOT.glob("configs/[!c]*.*"))  # without cleaning.yaml, which is for prepare.py


@pytest.mark.parametrize("path", SHARED_FILES, ids=lambda path: path.name)
def test_shipped_files_parse_and_name_existing_settings(path: Path) -> None:
    assert set(read_config_file(path, path.name)) <= set(FIELDS)


@pytest.mark.parametrize("path", [None, *sorted(ROOT.glob("configs/presets/*.*"))], ids=lambda p: p.name if p else "-")
def test_shipped_presets_merge_with_the_shared_files(path: Path | None) -> None:
    files = [path] if path else []
    loaded = ConfigLoader(ROOT, ROOT / "configs").load(files)
    assert loaded.config.tracking.aim_logging is True
    for preset in files:
        for key, setting in read_config_file(preset, "x").items():
            value = flat(loaded.config)[key]
            assert str(list(value) if isinstance(value, tuple) else value) == str(setting.value)


TAG_WORDS = "a tag is 1 to 64 letters, digits, '.', '_' or '-'"
PYTHON_TAG = "tag:yaml.org,2002:python/name:"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("\nn_layr: 2\n", "bad.yaml:2: unknown key n_layr; did you mean n_layer?"),
        ("model:\n  n_layr: 2\n", "bad.yaml:2: unknown key n_layr in section model; did you mean n_layer?"),
        ("optimiser:\n  beta1: 0.5\n", "bad.yaml:1: unknown key optimiser; did you mean optimizer?"),
        ("zzzzzz: 2\n", "bad.yaml:1: unknown key zzzzzz"),
        ("model:\n  batch_size: 2\n", "bad.yaml:2: batch_size belongs to section train, not model"),
        ("n_layer: two\n", "bad.yaml:1: n_layer: expected integer >= 1 and <= 1024, got 'two'"),
        ("n_layer: 2.5\n", "bad.yaml:1: n_layer: expected integer >= 1 and <= 1024, got 2.5"),
        ("n_layer: true\n", "bad.yaml:1: n_layer: expected integer >= 1 and <= 1024, got True"),
        ("n_layer: null\n", "bad.yaml:1: n_layer: expected integer >= 1 and <= 1024, got None"),
        ("dropout: false\n", "bad.yaml:1: dropout: expected number >= 0 and < 1, got False"),
        ("bias: 3\n", "bad.yaml:1: bias: expected true or false, got 3"),
        ("dataset: 5\n", "bad.yaml:1: dataset: expected text that is not empty, got 5"),
        ("tags: a\n", "bad.yaml:1: tags: expected list of names (in a file: [wide, long]), got 'a'"),
        ("tags: [a, 1]\n", "bad.yaml:1: tags: expected list of names (in a file: [wide, long]), got ['a', 1]"),
        ("\n\nn_layer: 0\n", "bad.yaml:3: n_layer: expected integer >= 1 and <= 1024, got 0"),
        ("dropout: 1.5\n", "bad.yaml:1: dropout: expected number >= 0 and < 1, got 1.5"),
        ("learning_rate: .nan\n", "bad.yaml:1: learning_rate: expected number > 0 and <= 10, got nan"),
        ("min_lr: .nan\n", "bad.yaml:1: min_lr: expected number >= 0 or none, got nan"),
        ("grad_clip: .inf\n", "bad.yaml:1: grad_clip: expected number >= 0, got inf"),
        ("n_layer: .nan\n", "bad.yaml:1: n_layer: expected integer >= 1 and <= 1024, got nan"),
        (
            "mlp: swigelu\n",
            "bad.yaml:1: mlp: expected gelu, gelu_tanh, relu2 or swiglu, got 'swigelu'; did you mean swiglu?",
        ),
        ("device: gpu\n", "bad.yaml:1: device: expected auto, cpu, cuda, cuda:N or mps, got 'gpu'"),
        (
            "ngram_rows: [64, 0]\n",
            "bad.yaml:1: ngram_rows: expected list of integers >= 1 (in a file: [1024, 512]), got [64, 0]",
        ),
        (
            "n_layer: 2\nn_head: 3\n",
            "bad.yaml:2: n_embd (128) must be divisible by n_head (3), or head_dim must be set",
        ),
        ("warmup_iters: 5000\n", "bad.yaml:1: warmup_iters (5000) must not exceed max_iters (2000)"),
        ("max_iters: 5\nepochs: 2\n", "bad.yaml:2: max_iters and epochs are alternatives: set exactly one of them"),
        ("run_tag: a/b\n", f"bad.yaml:1: run_tag: {TAG_WORDS}, not 'a/b'"),
        ("run_tag: latest\n", "bad.yaml:1: run_tag: the tag 'latest' is reserved"),
        (f"run_tag: {'x' * 65}\n", f"bad.yaml:1: run_tag: {TAG_WORDS}, not '{'x' * 65}'"),
        ("run_tag: boolean/\n", f"bad.yaml:1: run_tag: {TAG_WORDS}, not 'boolean/'"),
        ("seed: 1\nseed: 2\n", "bad.yaml:2: seed is set twice in this file (first in line 1)"),
        ("seed: 1\ntrain:\n  seed: 2\n", "bad.yaml:3: seed is set twice in this file (also at bad.yaml:1)"),
        ("model: 5\n", "bad.yaml:1: section model: expected a mapping, got 5"),
        ("model: [n_layer]\n", "bad.yaml:1: section model: expected a mapping, got ['n_layer']"),
        ("- n_layer: 2\n- n_head: 2\n", "bad.yaml:1: expected a mapping of settings, got a list"),
        ("just words\n", "bad.yaml:1: expected a mapping of settings, got a str"),
        (
            "n_layer: [2\n",
            "bad.yaml:2: not valid YAML: while parsing a flow sequence, expected ',' or ']', but got '<stream end>'",
        ),
        ("seed: 1\n n_layer: 2\n", "bad.yaml:2: not valid YAML: mapping values are not allowed here"),
        (
            "seed: 1\n\tn_layer: 2\n",
            "bad.yaml:2: not valid YAML: while scanning for the next token, "
            "found character '\\t' that cannot start any token",
        ),
        ("seed: 'a\n", "bad.yaml:2: not valid YAML: while scanning a quoted scalar, found unexpected end of stream"),
        (
            "seed: 1\n---\nseed: 2\n",
            "bad.yaml:2: not valid YAML: expected a single document in the stream, but found another document",
        ),
        ("note: *nowhere\n", "bad.yaml:1: not valid YAML: found undefined alias 'nowhere'"),
        ("seed: 1\nnote: !!python/name:os.system\n", f"bad.yaml:2: refused the YAML tag '{PYTHON_TAG}os.system'"),
        (
            "train: &small {seed: 1}\nmodel:\n  <<: *small\n",
            "bad.yaml:3: << is not supported: put what it merges into a file of its own (--config can be given several "
            "times)",
        ),
        ("1: 2\n", "bad.yaml:1: expected a name, not 1"),
        ("seed: 1\n? [a]\n: 2\n", "bad.yaml:2: expected a name, not ['a']"),
        ("note: &a [*a]\n", "bad.yaml:1: an alias refers to a value that contains it"),
        (b"seed: 1\nnote: caf\xe9\n", "bad.yaml: not UTF-8 text (byte 17)"),
        (b"\xff\xfes\x00e\x00", "bad.yaml: not UTF-8 text (byte 0)"),
        (
            "note: a\x00b\n",
            "bad.yaml: not valid YAML: unacceptable character #x0000: special characters are not allowed",
        ),
        ("n_layer: !!int two\n", "bad.yaml: not valid YAML: could not convert string to float: 'two'"),
        (f"seed: {'9' * 5000}\n", "bad.yaml:1: seed: expected integer >= 0 and < 9223372036854775808, got inf"),
        ("[" * 3000, "bad.yaml: nested too deeply"),
    ],
    ids=lambda value: repr(value)[:40],
)
def test_a_mistake_in_a_yaml_file_is_one_line_with_its_place(
    project: Path, write: Write, content: str | bytes, message: str
) -> None:
    assert refusal(project, write("bad.yaml", content)) == message


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('{\n "n_layr": 2}', "bad.json:2: unknown key n_layr; did you mean n_layer?"),
        ('{"model":\n {"batch_size": 2}}', "bad.json:2: batch_size belongs to section train, not model"),
        ('{\n "n_l\\u0061yr": 2}', "bad.json:1: unknown key n_layr; did you mean n_layer?"),  # an escape hides its line
        ('{"n_layer": 0}', "bad.json:1: n_layer: expected integer >= 1 and <= 1024, got 0"),
        ('{"batch_size": NaN}', "bad.json:1: batch_size: expected integer >= 1 or auto, got nan"),
        ('{"grad_clip": Infinity}', "bad.json:1: grad_clip: expected number >= 0, got inf"),
        ('{"seed": 1, "seed": 2}', "bad.json:1: seed is set twice in this file"),
        ('{"seed": 1,\n "train": {"seed": 2}}', "bad.json:1: seed is set twice in this file (also at bad.json:1)"),
        ("[1, 2]", "bad.json:1: expected a mapping of settings, got a list"),
        ('{"seed": 1,\n}', "bad.json:2: not valid JSON"),
        ("", "bad.json:1: not valid JSON: Expecting value"),
        ("seed: 1", "bad.json:1: not valid JSON: Expecting value"),
        (b'{"note": "\xe9"}', "bad.json: not UTF-8 text (byte 10)"),
        ("[" * 300_000, "bad.json: nested too deeply"),
        (f'{{"seed": {"9" * 5000}}}', "bad.json: not valid JSON: Exceeds the limit (4300 digits) for integer string"),
    ],
    ids=lambda value: repr(value)[:40],
)
def test_a_mistake_in_a_json_file_is_one_line_with_its_place(
    project: Path, write: Write, content: str | bytes, message: str
) -> None:
    assert refusal(project, write("bad.json", content)).startswith(message)


def test_a_mistake_in_the_legacy_file_names_it(project: Path, write: Write) -> None:
    write("config.json", '{"seed": 1,\n "batch_sise": 2}')
    assert refusal(project) == "config.json:2: unknown key batch_sise; did you mean batch_size?"


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"batch_size": "many"}, "--batch-size: expected integer >= 1 or auto, got 'many'"),
        ({"dropout": "nan"}, "--dropout: expected number >= 0 and < 1, got 'nan'"),
        ({"n_head": "none"}, "--n-head: expected integer >= 1 and <= 1024, got 'none'"),
        ({"mlp": "gelo"}, "--mlp: expected gelu, gelu_tanh, relu2 or swiglu, got 'gelo'; did you mean gelu?"),
        ({"run_tag": "a/b"}, f"--run-tag: {TAG_WORDS}, not 'a/b'"),
        ({"n_head": "3"}, "--n-head: n_embd (128) must be divisible by n_head (3), or head_dim must be set"),
        (
            {"keep_best": False, "patience": "3"},
            "--no-keep-best: patience exports the best weights: keep_best must be on",
        ),
    ],
)
def test_a_mistake_on_the_command_line_names_its_flag(project: Path, overrides: dict[str, Any], message: str) -> None:
    assert refusal(project, **overrides) == message


@pytest.mark.parametrize("flag", [True, False])
def test_a_broken_rule_names_the_setting_of_the_highest_layer(flag: bool, project: Path, write: Write) -> None:
    write("configs/model.yaml", "n_embd: 64\nn_head: 4\n")
    if flag:
        assert refusal(project, n_head="5").startswith("--n-head: n_embd (64) must be divisible by n_head (5)")
    else:
        assert refusal(project, write("mine.yaml", "n_head: 5\n")).startswith("mine.yaml:1: n_embd (64) must be")


def test_an_unknown_token_of_two_characters_is_reported_as_too_long(project: Path, write: Write) -> None:
    assert "one character" in refusal(project, write("a.yaml", "unknown_token: ab\n"))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("n_layer: 0", "b.yaml:1: n_layer: expected integer >= 1"),
        ("dropout: .nan", "b.yaml:1: dropout: expected number >= 0"),
        ("seed: !!binary aGVsbG8=", "b.yaml:1: seed: expected integer >= 0"),
        ("note: !!binary aGVsbG8=", "b.yaml:1: note: expected text"),
        ('note: "\\uD800"', "b.yaml:1: note: expected text"),
    ],
)
def test_a_mistake_in_a_file_is_reported_even_if_a_flag_shadows_it(
    text: str, message: str, project: Path, write: Write
) -> None:
    path = write("b.yaml", text + "\n")
    flags = {"n_layer": "2", "dropout": "0.1", "seed": "3", "note": "x"}
    with pytest.raises(ConfigError) as caught:
        ConfigLoader(project).load([path], flags)
    assert str(caught.value).startswith(message)


def test_several_mistakes_are_one_line_each(project: Path, write: Write) -> None:
    path = write("bad.yaml", "n_layer: 0\nseed: x\n")
    with pytest.raises(ConfigError) as caught:
        ConfigLoader(project).load([path])
    assert [line.split(": ")[0] for line in str(caught.value).splitlines()] == ["bad.yaml:1", "bad.yaml:2"]


def test_a_key_in_two_shared_files_is_reported_with_both(project: Path, write: Write) -> None:
    write("configs/model.yaml", "model:\n  n_layer: 2\n")
    write("configs/train.yml", "seed: 1\nn_layer: 2\n")
    message = "configs/train.yml:2: n_layer is also set in configs/model.yaml:2: keep one of them"
    assert refusal(project) == message


def test_a_missing_file_is_reported_with_the_nearest_name(project: Path, write: Write) -> None:
    write("small.yaml", "")
    message = "smal.yaml: no such configuration file; did you mean small.yaml?"
    assert refusal(project, project / "smal.yaml") == message
    assert refusal(project, project / "nowhere" / "a.yaml") == "nowhere/a.yaml: no such configuration file"


def test_a_folder_in_place_of_a_file_is_reported(project: Path) -> None:
    (project / "configs" / "x.yaml").mkdir()
    assert refusal(project) == "configs/x.yaml: cannot be read: Is a directory"


def test_other_suffixes_are_refused(project: Path, write: Write) -> None:
    assert refusal(project, write("a.toml", "seed = 1")) == "a.toml: expected a file that ends in .yaml, .yml, .json"


def test_a_missing_config_dir_is_an_error(project: Path) -> None:
    with pytest.raises(ConfigError, match=r"--config-dir .*nowhere: no such folder"):
        ConfigLoader(project, project / "nowhere")


def test_python_tags_in_yaml_execute_nothing(project: Path, write: Write, tmp_path: Path) -> None:
    witness = tmp_path / "witness"
    message = refusal(project, write("a.yaml", f'seed: !!python/object/apply:os.mkdir ["{witness}"]\n'))
    assert re.match(r"a\.yaml:1: refused the YAML tag .*python/object/apply:os\.mkdir", message)
    assert not witness.exists()


def test_nearest_finds_a_misspelling_but_nothing_for_an_unrelated_name() -> None:
    assert nearest("batch_sise", ["seed", "batch_size"]) == "; did you mean batch_size?"
    assert nearest("zzz", ["seed", "batch_size"]) == ""
    assert nearest("", []) == ""
    assert issubclass(ConfigError, UserError)


def test_a_run_tag_may_look_like_a_date(project: Path, write: Write) -> None:
    loaded = ConfigLoader(project).load([write("dated.yaml", "run_tag: 2026-01-31\n")])
    assert loaded.config.tracking.run_tag == "2026-01-31"


def test_load_only_ignores_the_shared_files(project: Path, write: Write) -> None:
    write("config.json", '{"seed": 1}')
    write("configs/a.yaml", "n_layer: 2\n")
    loaded = ConfigLoader(project).load_only(write("alone.yaml", "\nn_head: 2\n"))
    assert loaded.config == Config(model=ModelConfig(n_head=2))
    assert loaded.source("n_head") == "alone.yaml:2"
    assert loaded.source("n_layer") == "default"


def test_load_only_reports_mistakes(project: Path, write: Write) -> None:
    for content, message in (("n_layer: 0\n", "alone.yaml:1: n_layer: "), ("n_layers: 1\n", "did you mean n_layer?")):
        with pytest.raises(ConfigError) as caught:
            ConfigLoader(project).load_only(write("alone.yaml", content))
        assert message in str(caught.value)
    with pytest.raises(ConfigError, match="no such configuration file"):
        ConfigLoader(project).load_only(project / "nowhere.yaml")


def test_a_base_replaces_defaults_and_shared_files(project: Path, write: Write) -> None:
    base = ConfigLoader(project).load_only(write("base.yaml", "seed: 7\nn_layer: 2\nn_head: 2\n"))
    write("configs/a.yaml", "n_layer: 3\nbatch_size: 24\n")
    loaded = ConfigLoader(project).load_onto(base, [write("more.yaml", "\nn_head: 8\n")], {"eval_iters": "5"})
    keys = ("seed", "n_layer", "n_head", "eval_iters", "batch_size")
    assert [flat(loaded.config)[key] for key in keys] == [7, 2, 8, 5, 12]
    assert [loaded.source(key) for key in keys] == [
        "base.yaml:1",
        "base.yaml:2",
        "more.yaml:2",
        "--eval-iters",
        "default",
    ]
    assert [setting.value for setting in loaded.layers["n_head"]] == [4, 2, 8]


def test_a_base_is_not_changed_by_layers_on_top(project: Path, write: Write) -> None:
    base = ConfigLoader(project).load_only(write("base.yaml", "seed: 7\n"))
    before = base.sources_json()
    ConfigLoader(project).load_onto(base, (), {"seed": "8", "epochs": "2"})
    assert base.sources_json() == before
    assert ConfigLoader(project).load_onto(base).config == base.config


def test_the_length_of_a_base_is_replaced_by_its_alternative(project: Path, write: Write) -> None:
    steps = ConfigLoader(project).load_only(write("steps.yaml", "max_iters: 50\n"))
    loaded = ConfigLoader(project).load_onto(steps, (), {"epochs": "2.5"})
    assert (loaded.config.train.max_iters, loaded.config.train.epochs) == (None, 2.5)
    epochs = ConfigLoader(project).load_only(write("epochs.yaml", "max_iters: null\nepochs: 2.5\n"))
    loaded = ConfigLoader(project).load_onto(epochs, [write("more.yaml", "max_iters: 60\n")])
    assert (loaded.config.train.max_iters, loaded.config.train.epochs) == (60, None)


def test_mistakes_on_top_of_a_base_are_reported_with_their_place(project: Path, write: Write) -> None:
    base = ConfigLoader(project).load_only(write("base.yaml", "n_embd: 64\n"))
    with pytest.raises(
        ConfigError, match=r"^--n-head: n_embd \(64\) must be divisible by n_head \(5\)|^base\.yaml:1: "
    ):
        ConfigLoader(project).load_onto(base, (), {"n_head": "5"})
    with pytest.raises(ConfigError, match=r"^--seed: expected integer"):
        ConfigLoader(project).load_onto(base, (), {"seed": "x"})


# ------------------------------------------------------------------------------------- files that are too large

BOMB = "a: &a [x,x,x,x,x,x,x,x,x,x]\n" + "".join(
    f"{name}: &{name} [{','.join([f'*{before}'] * 10)}]\n" for before, name in zip("abcdefgh", "bcdefghi", strict=True)
)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (BOMB, "x.yaml: more than 10,000 values, with its aliases expanded"),
        (
            f"note: &a [{'x,' * 200}]\ntags: [{'*a,' * 200}]",
            "x.yaml: more than 10,000 values, with its aliases expanded",
        ),
        ("a: &a {<<: *a}", "x.yaml:1: an alias refers to a value that contains it"),
        ("tags: &a [*a]", "x.yaml:1: an alias refers to a value that contains it"),
        (f"? {'k' * 9000}\n: 1", f"x.yaml:1: unknown key {'k' * 200}... (9,000 characters)"),
        (f"data: {'k' * 9000}", f"x.yaml:1: section data: expected a mapping, got '{'k' * 199}... (9,002 characters)"),
        (f"seed: 0x{'f' * 9000}", "x.yaml:1: seed: expected integer >= 0 and < 9223372036854775808, got a number that"),
        (f"note: {'x' * (1 << 20)}", "x.yaml: cannot be read: is larger than 1 MiB"),
        *(
            (f"{key}: {'k' * 9000}", f"x.yaml:1: {key}: ")
            for key in ("run_tag", "seed", "dtype", "callbacks", "qa_template", "compile")
        ),
    ],
)
def test_the_size_of_a_configuration_file_and_of_its_messages_is_limited(
    tmp_path: Path, text: str, expected: str
) -> None:
    path = tmp_path / "x.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError) as caught:
        ConfigLoader(tmp_path).load([path])
    assert str(caught.value).startswith(expected)
    assert len(str(caught.value)) < 500


@pytest.mark.parametrize(
    "text",
    [
        f"# {'x' * ((1 << 20) - 11)}\nseed: 1\n",  # 1 MiB
        f"seed: 1\ntags: [{','.join(['x'] * 9995)}]\n",  # two names, a number, a list and a mapping
        f"seed: 1\nqa_stop: &a x\ntags: [{','.join(['*a'] * 9993)}]\n",
    ],
)
def test_files_are_read_up_to_the_limits(tmp_path: Path, text: str) -> None:
    path = tmp_path / "x.yaml"
    path.write_text(text)
    assert read_config_file(path, "x.yaml")["seed"].value == 1
    path.write_text(f"#{text}" if text.startswith("#") else text.replace("[", "[x,"))
    with pytest.raises(ConfigError, match=r"^x.yaml: (more than 10,000 values|cannot be read: is larger)"):
        read_config_file(path, "x.yaml")


def test_an_alias_may_be_used_and_a_link_may_lead_anywhere(tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "x.yaml").write_text("tags: &a [x, y]\ncallbacks: []\nnote: &n text\nexperiment: *n\n")
    path = tmp_path / "x.yaml"
    path.symlink_to(tmp_path / "elsewhere" / "x.yaml")
    tracking = ConfigLoader(tmp_path).load([path]).config.tracking
    assert (tracking.tags, tracking.note, tracking.experiment) == (("x", "y"), "text", "text")


def test_a_pipe_or_device_in_place_of_a_file_is_reported(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "x.yaml")
    (tmp_path / "y.yaml").symlink_to("/dev/zero")
    for name, kind in (("x", "a pipe"), ("y", "a device")):
        with pytest.raises(ConfigError, match=f"{name}.yaml: cannot be read: is {kind}, not a file"):
            ConfigLoader(tmp_path).load([tmp_path / f"{name}.yaml"])


# ------------------------------------------------------------------------------- settings in Python


def test_settings_in_python_are_a_separate_layer(project: Path, write: Write) -> None:
    write("configs/a.yaml", "seed: 4\nn_layer: 4\neval_iters: 4\n")
    loader = ConfigLoader(project)
    loaded = loader.load_code({"seed": 5, "model": {"n_layer": 6}})
    assert [flat(loaded.config)[key] for key in ("seed", "n_layer", "eval_iters")] == [5, 6, 4]
    assert [loaded.source(key) for key in ("seed", "n_layer", "eval_iters")] == ["code", "code", "configs/a.yaml:3"]
    onto = loader.load_code({"n_layer": 7}, loaded)
    assert [flat(onto.config)[key] for key in ("seed", "n_layer", "eval_iters")] == [5, 7, 4]
    assert [setting.value for setting in onto.layers["n_layer"]] == [4, 4, 6, 7]
    assert [setting.value for setting in loaded.layers["n_layer"]] == [4, 4, 6]  # the base is not changed


@pytest.mark.parametrize(
    ("key", "value", "plain"),
    [
        ("max_iters", np.int64(5), 5),
        ("max_iters", torch.tensor(5), 5),
        ("learning_rate", np.float64(1e-3), 1e-3),
        ("bias", np.bool_(False), False),
        ("dataset", Path("texts/a.txt"), "texts/a.txt"),
        ("dataset", np.str_("pydocs"), "pydocs"),
        ("eval_at", range(1, 4), [1, 2, 3]),
        ("eval_at", np.arange(1, 4), [1, 2, 3]),
        ("eval_at", (step for step in (1, 2)), [1, 2]),
        ("eval_at", map(np.int64, (1, 2)), [1, 2]),
        ("tags", {"wide"}, ["wide"]),
        ("n_kv_head", "none", None),  # as yaml.safe_load reads it
        ("rope_scaling", "none", "none"),
    ],
)
def test_a_value_set_in_python_is_recorded_as_plain_json(project: Path, key: str, value: Any, plain: Any) -> None:
    """Without that, checking a generator would exhaust it, and a shadowed range could not be written as JSON."""
    loaded = ConfigLoader(project).load_code({key: value})
    assert loaded.layers[key][-1] == Setting(plain, "code")
    assert type(loaded.layers[key][-1].value) is type(plain)
    found = flat(loaded.config)[key]
    assert (list(found) if isinstance(found, tuple) else found) == plain
    onto = ConfigLoader(project).load_code({key: flat(Config())[key]}, loaded)
    json.dumps(onto.sources_json())


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"n_layers": 2}, "unknown key n_layers; did you mean n_layer?"),
        ({"modell": 2}, "unknown key modell; did you mean model?"),
        ({"model": {"n_layers": 2}}, "unknown key n_layers in section model; did you mean n_layer?"),
        ({"model": {"seed": 2}}, "seed belongs to section train, not model"),
        ({"seed": 1, "train": {"seed": 1}}, "seed is set twice"),
        ({"model": 3}, "section model: expected a mapping, got 3"),
        ({"model": ModelConfig()}, "section model: expected a mapping, got ModelConfig(n_layer=4, "),
        ({3: 3}, "unknown key 3"),
        ({"seed": "x"}, "code: seed: expected integer >= 0 "),
    ],
    ids=str,
)
def test_a_mistake_in_python_is_reported(project: Path, settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        ConfigLoader(project).load_code(settings)
    assert str(caught.value).startswith(message)


def test_a_rule_broken_after_loading_names_the_place_of_the_highest_layer(project: Path, write: Write) -> None:
    write("configs/a.yaml", "warmup_iters: 5\n")
    loaded = ConfigLoader(project).load((), {"max_iters": "100"})
    for keys, place in (
        (("warmup_iters", "lr_decay_iters"), "configs/a.yaml:1"),
        (("warmup_iters", "max_iters"), "--max-iters"),
        (("lr_decay_iters", "max_iters"), "--max-iters"),
        (("lr_decay_iters",), "default"),
    ):
        assert str(rule_error(RuleError("too long", *keys), loaded)) == f"{place}: too long"


def test_config_files_lists_the_files_of_all_layers(project: Path, write: Write) -> None:
    write("configs/a.yaml", "warmup_iters: 5\nmin_lr: 0\n")
    write("configs/b.yml", "# nothing\n")
    more = write("more.json", '{"seed": 1}')
    loaded = ConfigLoader(project).load([more], {"warmup_iters": "7", "note": "a:b", "seed": "2"})
    assert config_files(loaded) == {"configs/a.yaml", "more.json"}
    assert config_files(LoadedConfig.from_config(Config())) == set()


def test_load_layer_puts_one_layer_on_top_of_the_defaults() -> None:
    loaded = load_layer({"n_layer": Setting(3, "foreign.json: layers"), "n_head": Setting(2, "--n-head")})
    assert loaded.config == Config(model={"n_layer": 3, "n_head": 2})
    assert [setting.source for setting in loaded.layers["n_layer"]] == ["default", "foreign.json: layers"]
    with pytest.raises(ConfigError, match=r"^foreign.json: layers: n_layer: expected integer >= 1 and <= 1024, got 0$"):
        load_layer({"n_layer": Setting(0, "foreign.json: layers")})
