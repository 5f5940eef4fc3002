"""The settings: their facts and bounds, rules between them, kinds, hash and schema."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any, get_args, get_origin

import pytest
from fake_runs import config_of
from pydantic import ValidationError

from utils.config.fields import (
    ADDED,
    FIELDS,
    SECTION_OF,
    SECTIONS,
    config_hash,
    derived_settings,
    expected,
    field_fact,
    flat,
    iter_fields,
    json_schema,
)
from utils.config.section import Section
from utils.config.settings import Config, InferenceConfig, ModelConfig, OptimizerConfig, TrainConfig, warmup_steps
from utils.config.tags import RESERVED_TAGS, check_tag
from utils.errors import UserError

ROOT = Path(__file__).resolve().parents[2]


def types_of(key: str) -> set[type]:
    """The plain types that a setting may have: {int, NoneType} for `Int | None`."""
    if get_origin(FIELDS[key].annotation) is tuple:
        return {tuple}
    members = get_args(FIELDS[key].annotation) or (FIELDS[key].annotation,)
    return {getattr(member, "__origin__", member) for member in members}


NUMBERS = [key for key in FIELDS if types_of(key) & {int, float}]
FLOATS = [key for key in FIELDS if float in types_of(key)]


@pytest.mark.parametrize("key", FIELDS)
def test_every_setting_has_a_meaning_a_kind_and_a_default_within_its_bounds(key: str) -> None:
    assert len(FIELDS[key].description or "") > 5
    assert field_fact(key, "kind") in ("trajectory", "observation", "machine")
    assert isinstance(field_fact(key, "unit"), str)
    assert expected(key).strip()
    default = FIELDS[key].default
    assert flat(config_of(**{key: default}))[key] == default


def test_leaf_names_are_unique_and_differ_from_section_names() -> None:
    keys = [key for _, key, _ in iter_fields()]
    assert len(keys) == len(set(keys)) == len(FIELDS)
    assert not set(keys) & set(SECTIONS)
    assert list(SECTIONS) == ["data", "arithmetic", "model", "optimizer", "train", "tracking", "inference"]


@pytest.mark.parametrize(
    ("key", "kind"),
    [
        *((key, "trajectory") for key in ("seed", "n_embd", "learning_rate", "dtype", "device", "threads")),
        *((key, "trajectory") for key in ("eval_interval", "eval_iters", "batch_size", "dropout", "deterministic")),
        *((key, "observation") for key in ("log_interval", "histogram_interval", "run_tag", "aim_logging", "note")),
        *((key, "observation") for key in InferenceConfig.model_fields),
        *((key, "machine") for key in ("runs_dir", "corpora_dir", "aim_repo")),
    ],
)
def test_kind_says_whether_a_setting_changes_the_numbers(key: str, kind: str) -> None:
    assert field_fact(key, "kind") == kind


@pytest.mark.parametrize(
    ("key", "inside", "outside"),
    [
        ("val_fraction", [0.001, 0.999], [0, 1, -0.1]),
        ("n_layer", [1, 1024], [0, -1, 1025]),
        ("n_head", [1], [0, 1025]),
        ("n_kv_head", [1, None], [0, -2]),
        ("n_embd", [4, 65536], [0, 65540]),
        ("ffn_dim", [1, None], [0]),
        ("block_size", [1, 65536], [0, 65537]),
        ("dropout", [0, 0.999], [1, -0.01]),
        ("rope_theta", [0.5], [0]),
        ("norm_eps", [1e-12], [0, 1]),
        ("learning_rate", [1e-9, 10], [0, -1e-3, 10.5]),
        ("min_lr", [0, 1e-3], [-1e-9]),
        ("warmup_iters", [0, 2000], [-1]),
        ("lr_decay_iters", [1], [0]),
        ("weight_decay", [0, 10], [-0.1, 11]),
        ("beta1", [0, 0.999], [1, -0.1]),
        ("beta2", [0, 0.999], [1, -0.1]),
        ("adam_eps", [1e-15], [0, 1]),
        ("grad_clip", [0, 100], [-1]),
        ("max_iters", [1], [0, -5]),
        ("batch_size", [1, "auto"], [0, "all", None]),
        ("tokens_per_step", [None], [0]),
        ("gradient_accumulation_steps", [1, 12], [0]),
        ("eval_interval", [1], [0]),
        ("eval_iters", [1], [0]),
        ("seed", [0, 2**63 - 1], [-1, 2**63]),
        ("threads", [1, None], [0, 1025]),
        ("log_interval", [1], [0]),
        ("max_new_tokens", [1, 1_000_000], [0, 1_000_001]),
        ("temperature", [0, 1_000_000], [-0.1, 1_000_001]),
        ("top_k", [1, None], [0]),
        ("top_p", [0.001, 1, None], [0, 1.1]),
        ("min_p", [0, 1, None], [-0.1, 1.1]),
        ("repetition_penalty", [0.001, 1000], [0, 1001]),
        ("flush_interval", [1], [0]),
        ("histogram_interval", [0], [-1]),
        ("sample_tokens", [0], [-1]),
        ("tracking_budget", [0.001, 1], [0, 1.01]),
        ("device", ["cpu", "cuda", "cuda:3", "mps", "auto"], ["gpu", "cuda:", "cuda:x", "CPU", " cpu"]),
        ("dataset", ["pydocs", "a/b.txt"], [""]),
        ("unknown_token", ["?", "ü", None], ["", "ab"]),
        ("tokenizer", ["char", "byte", "bpe", "gpt2", "hf:a/tokenizer.json"], ["", "word", "hf", "hf:", "gpt2:x"]),
        ("bpe_vocab_size", [257, 1_000_000], [256, 1_000_001]),
        ("schedule", ["cosine", "linear", "constant"], ["cos"]),
        ("dtype", ["auto", "float32", "bfloat16", "float16"], ["fp32"]),
        ("position", ["learned", "rope"], ["alibi"]),
        ("norm", ["layernorm", "rmsnorm"], ["batchnorm"]),
        ("mlp", ["gelu", "swiglu"], ["relu"]),
    ],
)
def test_values_at_the_edges_of_the_bounds(key: str, inside: list[Any], outside: list[Any]) -> None:
    for value in inside:
        assert flat(config_of(**{key: value}))[key] == value
    for value in outside:
        with pytest.raises(ValidationError, match=key):
            config_of(**{key: value})


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("key", FLOATS)
def test_nan_and_infinity_are_refused(key: str, value: float) -> None:
    with pytest.raises(ValidationError, match=key):
        config_of(**{key: value})


@pytest.mark.parametrize("value", [True, False, "many", [1], {"a": 1}])
@pytest.mark.parametrize("key", NUMBERS)
def test_a_number_is_not_a_switch_text_list_or_mapping(key: str, value: Any) -> None:
    with pytest.raises(ValidationError, match=key):
        config_of(**{key: value})


@pytest.mark.parametrize("key", [key for key in NUMBERS if float not in types_of(key)])
def test_an_integer_has_no_fraction(key: str) -> None:
    with pytest.raises(ValidationError, match=key):
        config_of(**{key: 2.5})


def test_settings_are_frozen() -> None:
    config = Config()
    with pytest.raises(UserError, match=r"^seed cannot be set: .* frozen; train\(config, seed=\.\.\.\) changes"):
        config.train.seed = 1
    with pytest.raises(UserError, match="frozen"):
        config.train = config.train
    with pytest.raises(UserError, match="frozen"):
        config.tracking.tags = ("a",)
    assert config.model_copy(update={"train": TrainConfig(seed=7)}).train.seed == 7


def test_a_copy_cannot_have_unknown_settings() -> None:
    with pytest.raises(UserError, match=r"^Config has no n_layer$"):
        Config().model_copy(update={"n_layer": 2})
    with pytest.raises(UserError, match=r"^ModelConfig has no n_layers; did you mean n_layer\?$"):
        ModelConfig().model_copy(update={"n_layers": 2})


@pytest.mark.parametrize("section", [None, *SECTIONS])
def test_unknown_keys_are_forbidden(section: str | None) -> None:
    surplus = {"no_such_key": 1}
    with pytest.raises(ValidationError, match="no_such_key"):
        Config.model_validate(surplus if section is None else {section: surplus})


TOKENS = "special_tokens: expected distinct tokens other than <|endoftext|>, got"
EVEN = "position rope rotates pairs of channels: the head dimension must be even"


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"unknown_token": "?", "tokenizer": "byte"}, "unknown_token needs tokenizer char, not byte"),
        ({"special_tokens": ["<a>"]}, "special_tokens needs tokenizer bpe, not char"),
        ({"special_tokens": ["<a>", "<a>"], "tokenizer": "bpe"}, f"{TOKENS} ['<a>', '<a>']"),
        ({"special_tokens": [""], "tokenizer": "bpe"}, f"{TOKENS} ['']"),
        ({"special_tokens": ["<|endoftext|>"], "tokenizer": "bpe"}, f"{TOKENS} ['<|endoftext|>']"),
        (
            {"special_tokens": ["<a>"], "tokenizer": "bpe", "bpe_vocab_size": 257},
            "bpe_vocab_size (257) must be at least 258: 256 bytes, <|endoftext|> and 1 special tokens",
        ),
        ({"n_embd": 130}, "n_embd (130) must be divisible by n_head (4), or head_dim must be set"),
        ({"n_head": 6, "n_embd": 96, "n_kv_head": 4}, "n_head (6) must be divisible by n_kv_head (4)"),
        ({"n_kv_head": 8}, "n_head (4) must be divisible by n_kv_head (8)"),
        ({"position": "rope", "n_embd": 12}, f"{EVEN}, not 3"),
        ({"position": "rope", "head_dim": 5}, f"{EVEN}, not 5"),
        ({"warmup_iters": 11, "max_iters": 10}, "warmup_iters (11) must not exceed max_iters (10)"),
        ({"warmup_iters": 11, "lr_decay_iters": 10}, "warmup_iters (11) must not exceed lr_decay_iters (10)"),
        ({"min_lr": 0.01}, "min_lr (0.01) must not exceed learning_rate (0.001)"),
        ({"max_iters": None}, "max_iters and epochs are alternatives: set exactly one of them"),
        ({"epochs": 1.0}, "max_iters and epochs are alternatives: set exactly one of them"),
        (
            {"batch_size": 12, "gradient_accumulation_steps": 5},
            "batch_size (12) must be divisible by gradient_accumulation_steps (5)",
        ),
        (
            {"batch_size": "auto", "gradient_accumulation_steps": 2},
            "batch_size auto also chooses gradient_accumulation_steps: it must be 1, not 2",
        ),
        (
            {"tokens_per_step": 640},
            "tokens_per_step (640) and batch_size (12) are alternatives: with tokens_per_step, batch_size must be auto",
        ),
        (
            {"batch_size": "auto", "tokens_per_step": 700},
            "tokens_per_step (700) must be a multiple of block_size (64): 640 or 704",
        ),
        (
            {"batch_size": "auto", "tokens_per_step": 63},
            "tokens_per_step (63) must be a multiple of block_size (64): 64",
        ),
        ({"patience": 3, "keep_best": False}, "patience exports the best weights: keep_best must be on"),
        (
            {"export_weights": "best", "keep_best": False},
            "export_weights exports the best weights: keep_best must be on",
        ),
    ],
)
def test_broken_rules_between_settings_are_reported_with_the_values(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError) as caught:
        config_of(**settings)
    assert [detail["msg"] for detail in caught.value.errors()] == [f"Value error, {message}"]


@pytest.mark.parametrize(
    "settings",
    [
        {"n_embd": 130, "head_dim": 32},
        {"n_head": 8, "n_kv_head": 2},
        {"position": "rope", "n_embd": 8, "n_head": 4},
        {"position": "rope", "n_embd": 12, "n_head": 4, "head_dim": 2},
        {"warmup_iters": 10, "max_iters": 10},
        {"warmup_iters": 500, "max_iters": None, "epochs": 0.5},
        {"min_lr": 0.001, "learning_rate": 0.001},
        {"max_iters": None, "epochs": 0.5},
        {"batch_size": 12, "gradient_accumulation_steps": 12},
        {"batch_size": "auto", "tokens_per_step": 640},
        {"batch_size": "auto", "max_iters": None, "epochs": 1.0},
        {"norm": "rmsnorm", "mlp": "swiglu", "position": "rope", "bias": False},
        {"qkv_bias": True, "bias": True},
        {"qkv_bias": False, "bias": False},
    ],
)
def test_settings_that_satisfy_the_rules_are_accepted(settings: dict[str, Any]) -> None:
    config = flat(config_of(**settings))
    assert {key: config[key] for key in settings} == settings


def test_settings_that_are_none_are_derived() -> None:
    model = config_of(n_head=4, n_embd=96).model
    assert (model.kv_heads, model.head_width, model.ffn_width) == (4, 24, 384)
    assert config_of(n_embd=96, mlp="swiglu").model.ffn_width == 256  # 8/3 * 96
    assert config_of(n_embd=100, mlp="swiglu").model.ffn_width == 288  # 266.7, rounded up to a multiple of 32
    assert config_of(ffn_dim=7, mlp="swiglu").model.ffn_width == 7
    assert config_of(n_kv_head=2, head_dim=10).model.head_width == 10
    assert config_of(learning_rate=0.5).optimizer.final_lr == 0.05
    assert config_of(min_lr=0.0).optimizer.final_lr == 0.0


def test_warmup_is_5_percent_of_the_run_unless_set() -> None:
    assert warmup_steps(OptimizerConfig(), 2000) == 100
    assert warmup_steps(OptimizerConfig(), 19) == 0
    assert warmup_steps(OptimizerConfig(warmup_iters=7), 10) == 7


@pytest.mark.parametrize("tag", ["a", "A.b_c-9", "2026", "x" * 64, ".hidden", "latest2"])
def test_tags_of_letters_digits_dots_underscores_and_dashes_are_accepted(tag: str) -> None:
    assert check_tag(tag) == tag
    assert config_of(run_tag=tag).tracking.run_tag == tag


@pytest.mark.parametrize(
    "tag", ["", "a/b", "../x", ".", "..", "a b", "x" * 65, "über", "a\n", "a\0", "latest", "auto", "a:b", "~"]
)
def test_tags_that_cannot_name_a_folder_are_refused(tag: str) -> None:
    letters = "a tag is 1 to 64 letters, digits, '.', '_' or '-'"
    words = f"the tag {tag!r} is reserved" if tag in RESERVED_TAGS else f"{letters}, not {tag!r}"
    with pytest.raises(ValueError) as caught:
        check_tag(tag)
    assert str(caught.value) == words
    with pytest.raises(ValidationError, match="run_tag"):
        config_of(run_tag=tag)


@pytest.mark.parametrize("key", FIELDS)
def test_hash_depends_on_trajectory_settings_only(key: str) -> None:
    config = Config()
    section = getattr(config, SECTION_OF[key])
    changed = config.model_copy(update={SECTION_OF[key]: section.model_copy(update={key: "another value"})})
    differs = config_hash(changed, {}) != config_hash(config, {})
    assert differs == (field_fact(key, "kind") == "trajectory")


def test_the_hash_of_the_defaults_is_that_of_runs_before_packing_and_arithmetic() -> None:
    assert config_hash(Config(), {}) == "e31d42b3ba382f034835a5b5f2b9d9a4233eb72fdf474fc1e73d4958e23c2c8d"


def test_the_hash_uses_resolved_values_instead_of_settings() -> None:
    auto, cpu = config_of(device="auto"), config_of(device="cpu")
    assert config_hash(auto, {}) != config_hash(cpu, {})
    assert config_hash(auto, {"device": "cpu"}) == config_hash(cpu, {"device": "cpu"})
    assert config_hash(auto, {"device": "cpu"}) != config_hash(auto, {"device": "cuda"})
    assert config_hash(auto, {"corpus_hash": "1"}) != config_hash(auto, {"corpus_hash": "2"})
    assert config_hash(auto, {"a": 1, "b": 2}) == config_hash(auto, {"b": 2, "a": 1})


def test_the_hash_of_a_run_does_not_change_when_settings_are_added() -> None:
    config = Config()
    older = {key: value for key, value in flat(config).items() if field_fact(key, "kind") == "trajectory"}
    older = {key: value for key, value in older.items() if key not in ADDED}
    text = json.dumps(older, sort_keys=True, default=str)
    assert config_hash(config, {}) == hashlib.sha256(text.encode()).hexdigest()
    packed = config.model_copy(update={"data": config.data.model_copy(update={"packing": "documents"})})
    assert config_hash(packed, {}) != config_hash(config, {})


@pytest.mark.parametrize(
    ("key", "words"),
    [
        ("n_layer", "integer >= 1 and <= 1024"),
        ("val_fraction", "number > 0 and < 1"),
        ("ffn_dim", "integer >= 1 or none"),
        ("batch_size", "integer >= 1 or auto"),
        ("mlp", "gelu, gelu_tanh, relu2 or swiglu"),
        ("tokenizer", "char, byte, bpe, gpt2 or hf:PATH"),
        ("bias", "true or false"),
        ("note", "text"),
        ("tags", "list of names (in a file: [wide, long])"),
        ("device", "auto, cpu, cuda, cuda:N or mps"),
        ("unknown_token", "text of one character or none"),
        ("dataset", "text that is not empty"),
        ("run_tag", "text or none"),
        ("seed", "integer >= 0 and < 9223372036854775808"),
        ("tracking_budget", "number > 0 and <= 1"),
        ("callbacks", 'list of names module:Class (in a file: ["smooth_loss:SmoothLoss"])'),
        ("ngram_rows", "list of integers >= 1 (in a file: [1024, 512])"),
    ],
)
def test_the_expected_values_are_described_in_words(key: str, words: str) -> None:
    assert expected(key) == words


def test_dump_and_validate_is_the_identity() -> None:
    config = config_of(n_layer=2, tags=("a", "b"), run_tag="x", learning_rate=0.1 + 0.2, max_iters=None, epochs=1 / 3)
    assert Config.model_validate(json.loads(json.dumps(config.model_dump(mode="json")))) == config


def test_the_shipped_schema_is_up_to_date() -> None:
    shipped = json.loads((ROOT / "docs" / "config.schema.json").read_text(encoding="utf-8"))
    assert shipped == json.loads(json.dumps(json_schema())), "run: make schema"


def test_the_schema_has_every_key_flat_and_in_its_section() -> None:
    schema = json_schema()
    assert set(FIELDS) | set(SECTIONS) == set(schema["properties"])
    assert schema["additionalProperties"] is False
    assert schema["properties"]["n_layer"]["maximum"] == 1024
    assert schema["properties"]["n_layer"]["kind"] == "trajectory"


@pytest.mark.parametrize("name", ["a:B", "my.module:Class", "examples.callbacks:Sampler_2"])
def test_a_callback_is_named_by_module_and_class(name: str) -> None:
    assert TrainConfig(callbacks=(name,)).callbacks == (name,)


@pytest.mark.parametrize(
    "name",
    ["", ":", "a", "a:", ":B", "a:B:C", "a..b:C", ".a:B", "a.:B", "a b:C", "a:B.c", "1a:B", "a:1B", "a-b:C", "a/b:C"],
)
def test_an_invalid_callback_name_is_refused(name: str) -> None:
    with pytest.raises(UserError) as caught:
        TrainConfig(callbacks=(name,))
    assert str(caught.value) == f"code: callbacks: a callback is named module:Class, not {name!r}"


@pytest.mark.parametrize(
    ("by_hand", "message"),
    [
        (lambda: ModelConfig(n_layers=2), "unknown key n_layers in section model; did you mean n_layer?"),
        (lambda: ModelConfig(n_layer="x"), "code: n_layer: expected integer >= 1 and <= 1024, got 'x'"),
        (lambda: ModelConfig(mlp="gelo"), "code: mlp: expected gelu, gelu_tanh, relu2 or swiglu, got 'gelo'; did you"),
        (lambda: ModelConfig(n_embd=15), "n_embd (15) must be divisible by n_head (4), or head_dim must be set"),
        (lambda: TrainConfig(batch_size=0), "code: batch_size: expected integer >= 1 or auto, got 0"),
        (
            lambda: TrainConfig(max_iters=0, seed=-1),
            "code: max_iters: expected integer >= 1 or none, got 0\ncode: seed:",
        ),
        (lambda: Config(n_layer=2), "n_layer belongs to section model"),
        (lambda: Config(modell=2), "unknown key modell; did you mean model?"),
        (lambda: Config(model=2), "section model: expected a ModelConfig or a mapping, got 2"),
        (lambda: Config(train=ModelConfig()), "section train: expected a TrainConfig or a mapping, got ModelConfig(n_"),
        (lambda: Config(model={"n_layers": 2}), "unknown key n_layers in section model; did you mean n_layer?"),
        (lambda: Config(model={"n_embd": 15}), "n_embd (15) must be divisible by n_head (4), or head_dim must be set"),
        (
            lambda: Config(optimizer=OptimizerConfig(warmup_iters=9), train=TrainConfig(max_iters=5)),
            "warmup_iters (9) must not exceed max_iters (5)",
        ),
    ],
)
def test_a_mistake_in_a_section_made_in_python_has_the_message_of_the_command_line(
    by_hand: Callable[[], Section], message: str
) -> None:
    with pytest.raises(UserError) as caught:
        by_hand()
    assert str(caught.value).startswith(message)
    assert caught.value.__suppress_context__


def test_derived_settings_depend_on_the_length_of_the_run() -> None:
    config = Config(
        model={"n_embd": 24, "n_head": 3, "block_size": 10},
        optimizer={"learning_rate": 0.5, "min_lr": 0.125, "warmup_iters": 7},
        train={"batch_size": 4, "max_iters": 300},
    )
    assert derived_settings(config, 200) == {
        **{"n_kv_head": 3, "head_dim": 8, "ffn_dim": 96, "qkv_bias": config.model.has_qkv_bias},
        **{"min_lr": 0.125, "warmup_iters": 7, "lr_decay_iters": 200, "max_iters": 200},
        **{"epochs": None, "tokens_per_step": 4 * 10},
    }
    assert derived_settings(Config(optimizer={"lr_decay_iters": 150}), 200)["lr_decay_iters"] == 150


@pytest.mark.parametrize("repo", [".", "/runs", "a:b", "aim://host:53800", "aim://10.0.0.1:1"])
def test_an_aim_repository_is_a_folder_or_a_server(repo: str) -> None:
    assert config_of(aim_repo=repo).tracking.aim_repo == repo


@pytest.mark.parametrize(
    ("repo", "folder"),
    [(".aim", "."), (".aim/", "."), ("/.aim", "/"), ("a/.aim", "a"), ("/a/.aim/", "/a"), ("a.aim", "a.aim")],
)
def test_an_aim_repository_given_as_dot_aim_is_its_parent_folder(repo: str, folder: str) -> None:
    assert config_of(aim_repo=repo).tracking.aim_repo == folder


@pytest.mark.parametrize("repo", ["http://host:53800", "aim://host", "aim://host:", "aim://u@host:1", "aim://host:1/x"])
def test_an_invalid_aim_address_is_refused(repo: str) -> None:
    with pytest.raises(ValidationError) as caught:
        config_of(aim_repo=repo)
    (detail,) = caught.value.errors()
    assert detail["loc"] == ("tracking", "aim_repo")
    assert detail["msg"] == f"Value error, expected a folder or aim://HOST:PORT, got {repo!r}"


def test_a_question_template_must_contain_the_question() -> None:
    assert config_of(qa_template="{question}").inference.qa_template == "{question}"
    with pytest.raises(ValidationError, match=r"expected text that contains \{question\}, got 'Q: \{\}' "):
        config_of(qa_template="Q: {}")
