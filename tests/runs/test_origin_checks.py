"""What a resume, a fork or a fine-tuning may change, and the messages about everything else."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from fake_runs import make_run

from utils.config.fields import FIELDS, derived_settings, field_fact, flat
from utils.config.loader import ConfigError, ConfigLoader, LoadedConfig
from utils.config.settings import Config, ModelConfig, OptimizerConfig, TrainConfig
from utils.errors import UserError
from utils.runs.origin import Origin, config_of_fork, recorded_config
from utils.runs.origin_checks import check_callbacks, check_fork, check_longer, check_model, check_overrides


@pytest.fixture
def loader(tmp_path: Path) -> ConfigLoader:
    """The loader of a project whose own configuration must not change a recorded one."""
    (tmp_path / "configs").mkdir()
    (tmp_path / "configs" / "train.yaml").write_text("batch_size: 24\n")
    return ConfigLoader(tmp_path)


@pytest.fixture
def run(runs_dir: Path) -> Path:
    settings = {"n_layer": 2, "seed": 7, "run_tag": "base"}
    return make_run(runs_dir, "20260101_000000_base", settings=settings, status="interrupted", tag="base")


def refusal(run: Path, loader: ConfigLoader, resolved: dict[str, Any] | None = None, **overrides: str | bool) -> str:
    """The message that refuses to resume the run with these flags."""
    recorded = recorded_config(run, loader)
    with pytest.raises(ConfigError) as caught:
        check_overrides(run, recorded, loader.load_onto(recorded, (), overrides), resolved or {})
    assert "\n" not in str(caught.value)
    return str(caught.value)


# ------------------------------------------------------------------------------------- overrides of a resume

OTHER_VALUES = {  # valid values other than the defaults
    "dataset": "shakespeare",
    "shard": "fsdp",
    "unknown_token": "?",
    "val_fraction": "0.2",
    "n_kv_head": "2",
    "head_dim": "16",
    "ffn_dim": "64",
    "dropout": "0.5",
    "position": "rope",
    "norm": "rmsnorm",
    "norm_eps": "0.01",
    "mlp": "swiglu",
    "bias": False,
    "min_lr": "0",
    "schedule": "linear",
    "warmup_iters": "3",
    "lr_decay_iters": "300",
    "beta1": "0.5",
    "beta2": "0.5",
    "adam_eps": "0.1",
    "gradient_accumulation_steps": "2",
    "callbacks": "my_module:MyCallback",
    "wandb_mode": "offline",
    "device": "cpu",
    "dtype": "float32",
    "threads": "3",
    "deterministic": True,
    "compile": True,
    "compile_mode": "max-autotune",
    "tf32": False,
    "fp8": True,
    "activation_checkpointing": True,
    "ngram_rows": "64,32",
    "qkv_bias": False,
    "qk_norm": True,
    "mlp_bias": False,
    "tie_embeddings": False,
    "zero_init": True,
    "optimizer_name": "muon",
    "weight_decay_schedule": "linear",
    "momentum": "0.9",
    "patience": "5",
    "export_weights": "best",
    "packing": "documents",
    "arithmetic_operators": "*",
    "arithmetic_format": "padded",
    "run_tag": "other",
    "tags": "a,b",
    "note": "text",
    "keep_best": False,
    "aim_logging": True,
    "tracking_budget": "0.5",
    "flush_interval": "60",
    "top_p": "0.9",
    "min_p": "0.1",
}
ONLY_ONE_VALUE = ("tokenizer",)
LENGTHS = ("max_iters", "epochs")
# Not tested alone: tokens_per_step is reported as batch_size, and the others need another tokenizer, packing or model.
DEPENDENT = (
    *("tokens_per_step", "special_tokens", "loss_after", "rope_scaling", "qk_norm_weights"),
    *("head_bias", "lora_alpha", "lora_dropout", "lora_targets"),
)


def other_value(key: str) -> str | bool:
    default = flat(Config())[key]
    if key in OTHER_VALUES:
        return OTHER_VALUES[key]
    if isinstance(default, bool):
        return not default
    return f"{default}x" if isinstance(default, str) else f"{(default or 1) * 2:g}"


@pytest.mark.parametrize("key", [key for key in FIELDS if key not in (*ONLY_ONE_VALUE, *LENGTHS, *DEPENDENT)])
def test_a_resume_may_override_only_settings_that_do_not_change_the_numbers(
    run: Path, loader: ConfigLoader, key: str
) -> None:
    value = other_value(key)
    recorded = recorded_config(run, loader)
    loaded = loader.load_onto(recorded, (), {key: value})
    assert flat(loaded.config)[key] != flat(recorded.config)[key]
    if field_fact(key, "kind") in ("observation", "machine"):
        check_overrides(run, recorded, loaded, {})
    else:
        message = refusal(run, loader, **{key: value})
        flag = ("--no-" if value is False else "--") + key.replace("_", "-")
        assert message.startswith(
            f"{flag}: {key} changes the numbers of a run, so 20260101_000000_base continues with "
        )
        assert message.endswith("; --fork starts a new run from its checkpoint")


def test_a_refusal_shows_both_values(run: Path, loader: ConfigLoader) -> None:
    assert refusal(run, loader, learning_rate="0.01") == (
        "--learning-rate: learning_rate changes the numbers of a run, so 20260101_000000_base continues with 0.001, "
        "not 0.01; --fork starts a new run from its checkpoint"
    )
    assert "continues with none, not 3;" in refusal(run, loader, patience="3")
    assert "continues with on, not off;" in refusal(run, loader, bias=False)


def test_a_setting_in_a_file_is_refused_with_its_line(run: Path, loader: ConfigLoader, tmp_path: Path) -> None:
    (tmp_path / "more.yaml").write_text("note: text\nseed: 8\n")
    recorded = recorded_config(run, loader)
    with pytest.raises(ConfigError, match=r"^more\.yaml:2: seed changes .* continues with 7, not 8"):
        check_overrides(run, recorded, loader.load_onto(recorded, [tmp_path / "more.yaml"]), {})


def test_an_override_with_the_recorded_value_is_accepted(run: Path, loader: ConfigLoader) -> None:
    recorded = recorded_config(run, loader)
    check_overrides(run, recorded, loader.load_onto(recorded, (), {"seed": "7", "n_layer": "2", "bias": True}), {})


def test_check_overrides_leaves_the_length_to_check_longer(run: Path, loader: ConfigLoader) -> None:
    recorded = recorded_config(run, loader)
    for override in ({"max_iters": "9"}, {"epochs": "2"}):
        check_overrides(run, recorded, loader.load_onto(recorded, (), override), {})


def test_an_override_with_the_value_that_auto_resolved_to_is_accepted(run: Path, loader: ConfigLoader) -> None:
    resolved = {"device": "cuda:1", "threads": 2, "n_kv_head": 4}
    recorded = recorded_config(run, loader)
    for flags in ({"device": "cuda:0"}, {"threads": "2"}, {"n_kv_head": "4"}):
        check_overrides(run, recorded, loader.load_onto(recorded, (), flags), resolved)
    assert "continues with cuda:1, not cpu" in refusal(run, loader, resolved, device="cpu")
    assert "continues with 2, not 3" in refusal(run, loader, resolved, threads="3")


# ------------------------------------------------------------------------------------- max_iters may grow


def length_refusal(old: int, new: int, status: str = "interrupted", **settings: Any) -> str:
    """The message that refuses to extend a run from `old` to `new` steps, or an empty text if that is allowed."""
    config = Config(optimizer=OptimizerConfig(**settings), train=TrainConfig(max_iters=max(old, new)))
    record = {"resolved": derived_settings(config, old), "status": status, "last_step": old}
    try:
        check_longer(Path("runs/a_run"), record, config, new)
    except ConfigError as error:
        return str(error)
    return ""


@pytest.mark.parametrize("status", ["interrupted", "crashed", "failed", "diverged"])
def test_an_incomplete_run_continues_to_its_end(status: str) -> None:
    assert length_refusal(100, 100, status) == ""


def test_a_complete_run_is_not_resumed() -> None:
    assert length_refusal(2000, 2000, "completed") == (
        "a_run is complete (2,000 steps); a larger --max-iters continues it if the schedule allows that, "
        "--fork starts a new run from its checkpoint"
    )


@pytest.mark.parametrize("status", ["interrupted", "completed"])
@pytest.mark.parametrize(
    "settings",
    [
        {"schedule": "constant", "warmup_iters": 10},
        {"schedule": "constant", "warmup_iters": 0},
        {"schedule": "cosine", "warmup_iters": 10, "lr_decay_iters": 100},
        {"schedule": "linear", "lr_decay_iters": 80},  # the warmup follows the decay
    ],
)
def test_a_run_may_grow_if_its_schedule_does_not_depend_on_the_length(settings: dict[str, Any], status: str) -> None:
    assert length_refusal(100, 200, status, **settings) == ""


def test_a_length_that_would_change_the_weight_decay_is_refused() -> None:
    settings = {"schedule": "constant", "warmup_iters": 10, "weight_decay_schedule": "linear"}
    assert "would change the weight decay that a_run was trained with" in length_refusal(
        100, 200, "completed", **settings
    )
    assert length_refusal(100, 200, "completed", **settings, weight_decay=0.0) == ""


@pytest.mark.parametrize(
    ("settings", "change"),
    [
        ({}, "warmup_iters from 100 to 200"),
        ({"warmup_iters": 10}, "lr_decay_iters from 2,000 to 4,000"),
        ({"schedule": "linear", "warmup_iters": 10}, "lr_decay_iters from 2,000 to 4,000"),
        ({"schedule": "constant"}, "warmup_iters from 100 to 200"),
        ({"lr_decay_iters": 3000}, "warmup_iters from 100 to 150"),
    ],
)
@pytest.mark.parametrize("status", ["interrupted", "completed"])
def test_a_length_that_would_change_learning_rates_is_refused(
    settings: dict[str, Any], change: str, status: str
) -> None:
    assert length_refusal(2000, 4000, status, **settings) == (
        f"--max-iters: 4,000 steps would change {change} and so the learning rates that a_run was trained with; "
        "--fork starts a new run from its checkpoint"
    )


@pytest.mark.parametrize("status", ["interrupted", "completed"])
def test_a_run_never_shrinks(status: str) -> None:
    message = length_refusal(2000, 1999, status, schedule="constant", warmup_iters=0)
    assert message == "--max-iters: a_run may grow, not shrink, from 2,000 to 1,999"


def test_a_run_that_ended_before_its_first_step_may_have_any_length() -> None:
    check_longer(Path("a_run"), {"status": "failed"}, Config(), 5)


def test_a_run_that_stopped_early_is_not_resumed_at_any_length() -> None:
    config = Config(optimizer=OptimizerConfig(schedule="constant", warmup_iters=0), train=TrainConfig(max_iters=200))
    record = {"resolved": derived_settings(config, 100), "status": "completed", "last_step": 40}
    with pytest.raises(ConfigError, match="a_run is complete: it stopped early at step 40"):
        check_longer(Path("a_run"), record, config, 200)


# ------------------------------------------------------------------------------------- weights that fit


def model(**settings: Any) -> ModelConfig:
    return ModelConfig(**{"n_layer": 1, "n_head": 2, "n_embd": 16, "block_size": 8} | settings)


def misfit(own: ModelConfig, parent: ModelConfig) -> str:
    with pytest.raises(ConfigError) as caught:
        check_model(own, parent.model_dump(mode="json"), "a_run")
    assert isinstance(caught.value, UserError)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize(
    ("own", "parent"),
    [
        ({}, {}),
        ({"dropout": 0.5}, {"dropout": 0.0}),
        ({"n_kv_head": 2, "head_dim": 8, "ffn_dim": 64, "qkv_bias": True}, {}),  # the values of none
        ({}, {"n_kv_head": 2, "head_dim": 8, "ffn_dim": 64}),
        ({"position": "rope", "block_size": 32}, {"position": "rope"}),
        ({"position": "rope", "block_size": 4}, {"position": "rope"}),
        ({"position": "rope", "rope_theta": 5e5}, {"position": "rope"}),
    ],
)
def test_weights_of_the_same_shapes_and_meaning_fit(own: dict[str, Any], parent: dict[str, Any]) -> None:
    check_model(model(**own), model(**parent).model_dump(mode="json"), "a_run")


@pytest.mark.parametrize(
    ("own", "parent", "facts", "flags"),
    [
        ({"block_size": 16}, {}, "block_size 8, not 16", "--block-size 8"),
        ({"n_layer": 3}, {}, "n_layer 1, not 3", "--n-layer 1"),
        ({"n_embd": 32}, {}, "n_embd 16, not 32", "--n-embd 16"),  # settings derived from it are not listed
        ({"n_head": 4}, {}, "n_head 2, not 4", "--n-head 2"),
        ({"mlp": "swiglu"}, {}, "mlp gelu, not swiglu", "--mlp gelu"),
        ({"bias": False}, {}, "bias on, not off", "--bias"),
        ({}, {"bias": False}, "bias off, not on", "--no-bias"),
        ({"norm": "rmsnorm"}, {}, "norm layernorm, not rmsnorm", "--norm layernorm"),
        ({}, {"norm": "rmsnorm"}, "norm rmsnorm, not layernorm", "--norm rmsnorm"),
        ({"position": "rope"}, {}, "position learned, not rope", "--position learned"),
        ({}, {"position": "rope"}, "position rope, not learned", "--position rope"),
        ({"norm_eps": 1e-6}, {}, "norm_eps 1e-05, not 1e-06", "--norm-eps 1e-05"),
        ({"n_kv_head": 1}, {"n_kv_head": 2}, "n_kv_head 2, not 1", "--n-kv-head 2"),
        ({"ffn_dim": 32}, {"ffn_dim": 48}, "ffn_dim 48, not 32", "--ffn-dim 48"),
        (
            {"bias": False, "qkv_bias": False},
            {"qkv_bias": True},
            "bias on, not off, qkv_bias on, not off",
            "--bias --qkv-bias",
        ),
        (
            {"n_layer": 3, "block_size": 16},
            {},
            "n_layer 1, not 3, block_size 8, not 16",
            "--n-layer 1 --block-size 8",
        ),
    ],
)
def test_a_misfit_is_reported_with_the_flags_that_fit(
    own: dict[str, Any], parent: dict[str, Any], facts: str, flags: str
) -> None:
    message = misfit(model(**own), model(**parent))
    assert message == f"the weights of a_run are of another model: {facts}; fitting: {flags}"


@pytest.mark.parametrize(
    ("own", "parent"),
    [
        ({"n_layer": 3, "n_embd": 32, "block_size": 16}, {}),
        ({"n_head": 4}, {}),
        ({"mlp": "swiglu"}, {}),
        ({}, {"mlp": "swiglu", "bias": False, "norm": "rmsnorm"}),
        ({"bias": False}, {}),
        ({"n_kv_head": 1}, {}),
        ({}, {"n_kv_head": 1, "head_dim": 4, "ffn_dim": 40}),
    ],
)
def test_the_suggested_flags_fit(loader: ConfigLoader, own: dict[str, Any], parent: dict[str, Any]) -> None:
    words = misfit(model(**own), model(**parent)).split("; fitting: ")[1].split()
    overrides: dict[str, str | bool] = {}
    for index, word in enumerate(words):
        if word.startswith("--"):
            value = words[index + 1] if index + 1 < len(words) and not words[index + 1].startswith("--") else None
            key = word.removeprefix("--no-" if word.startswith("--no-") else "--").replace("-", "_")
            overrides[key] = value if value is not None else not word.startswith("--no-")
    base = LoadedConfig.from_config(Config(model=model(**own)))
    fitting = loader.load_onto(base, (), overrides).config.model
    check_model(fitting, model(**parent).model_dump(mode="json"), "a_run")


# ------------------------------------------------------------------------------------- adapters of a fork


def adapted(**settings: Any) -> OptimizerConfig:
    return OptimizerConfig(**{"lora_rank": 2, "lora_targets": ("qkv", "up")} | settings)


def lora_state(config: OptimizerConfig) -> dict[str, Any]:
    """The adapter settings in a checkpoint of a run with this configuration."""
    return {"lora": {key: value for key, value in config.model_dump(mode="json").items() if key.startswith("lora_")}}


@pytest.mark.parametrize(
    ("own", "state"),
    [
        (OptimizerConfig(), {}),  # a checkpoint of an older version
        (OptimizerConfig(), lora_state(OptimizerConfig())),
        (adapted(), lora_state(adapted())),
        (adapted(lora_alpha=adapted().adapter_alpha), lora_state(adapted())),  # the value of none
        (adapted(learning_rate=0.5, lora_dropout=0.5), lora_state(adapted())),
    ],
)
def test_a_fork_with_the_adapters_of_its_parent_is_accepted(own: OptimizerConfig, state: dict[str, Any]) -> None:
    check_fork(own, state, "a_run")


@pytest.mark.parametrize(
    ("own", "parent", "words"),
    [
        (adapted(lora_rank=4), adapted(), "lora_rank 2, not 4"),
        (adapted(lora_alpha=7.5), adapted(lora_alpha=3), "lora_alpha 3, not 7.5"),
        (adapted(lora_targets=("up",)), adapted(), "lora_targets qkv, up, not up"),
        (OptimizerConfig(), adapted(), "lora_rank 2, not none"),
        (adapted(), OptimizerConfig(), "lora_rank none, not 2"),
    ],
)
def test_a_fork_with_other_adapters_is_refused(own: OptimizerConfig, parent: OptimizerConfig, words: str) -> None:
    with pytest.raises(ConfigError) as caught:
        check_fork(own, lora_state(parent), "a_run")
    assert str(caught.value) == (
        f"--fork: a_run was trained with {words}; --init-from starts with its weights, adapters merged into them"
    )


# ------------------------------------------------------------------------------------- callbacks of a foreign run


def test_callbacks_that_only_a_foreign_run_names_need_trust(
    runs_dir: Path, loader: ConfigLoader, tmp_path: Path
) -> None:
    path = make_run(runs_dir, "20260102_000000", settings={"callbacks": ("evil:Evil", "known:Known")}, host="eve")
    (tmp_path / "configs" / "callbacks.yaml").write_text("callbacks: [known:Known]\n")

    def check(trusted: bool = False, **overrides: str | bool) -> None:
        check_callbacks(Origin("fork", path, trusted=trusted), config_of_fork(path, loader, (), overrides), loader)

    with pytest.raises(UserError, match=r"20260102_000000 was made on eve, .*: callback evil:Evil \(not found\); --tr"):
        check()
    check(trusted=True)
    check(callbacks="evil:Evil")
    (tmp_path / "configs" / "callbacks.yaml").write_text("callbacks: [known:Known, evil:Evil]\n")
    check()
