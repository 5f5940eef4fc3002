"""The screen that --show-info prints about an export."""

from __future__ import annotations

import io
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from fake_runs import make_run, write
from rich.console import Console

from model import LanguageModel
from tests.tiny_export import char_tokenizer
from utils.config.settings import ModelConfig
from utils.inference.export import load_export, save_export
from utils.inference.info import SHOWN_TOKENS, ModuleSummary, architecture, info_screen, summarize_modules, vocabulary

CPU = torch.device("cpu")
TOKENIZER = char_tokenizer("\n abc")
TRAINING = {
    "run": "20260131_142501_baseline",
    "weights": "best",
    "step": 1500,
    "val/loss": 1.25,
    "train/eval_loss": "nan",
    "dataset": "shakespeare",
    "corpus_hash": "0123456789abcdef",
}
VARIANTS: dict[str, dict[str, Any]] = {
    "gpt2": {},
    "llama": {"position": "rope", "norm": "rmsnorm", "mlp": "swiglu", "n_kv_head": 1, "bias": False},
    "untied": {"tie_embeddings": False, "ngram_rows": (31, 37), "qk_norm": True, "logit_softcap": 30.0},
}


def make_model(**settings: Any) -> LanguageModel:
    return LanguageModel(ModelConfig(**{"n_layer": 3, "n_head": 2, "n_embd": 8, "block_size": 12} | settings), 5)


def screen(folder: Path) -> str:
    console = Console(file=io.StringIO(), width=120)
    for part in info_screen(load_export(folder, CPU), folder):
        console.print(part, soft_wrap=True)
    return console.file.getvalue()  # type: ignore[attr-defined]


def words(text: str) -> list[list[str]]:
    return [line.split() for line in text.splitlines()]


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A run directory with an export."""
    path = make_run(tmp_path, "20260131_142501_baseline", tag="baseline", git={"commit": "c" * 40, "dirty": True})
    save_export(path / "artifacts" / "export", make_model(), TOKENIZER, TRAINING)
    return path


@pytest.mark.parametrize("variant", VARIANTS)
def test_the_modules_have_all_parameters_of_the_model(variant: str) -> None:
    model = make_model(**VARIANTS[variant])
    parts = summarize_modules(model)
    assert sum(part.parameters for part in parts) == model.num_parameters()
    assert len({part.name for part in parts}) == len(parts)
    for part in parts:
        in_one = sum(torch.Size(shape).numel() for shape in part.shapes)
        assert part.parameters == in_one * (part.blocks or 1)


def test_modules_of_all_blocks_are_summed() -> None:
    parts = {part.name: part for part in summarize_modules(make_model())}
    assert parts["attention qkv"] == ModuleSummary("attention qkv", 3, 3 * (24 * 8 + 24), [(24, 8), (24,)])
    assert parts["token embedding, head"] == ModuleSummary("token embedding, head", 0, 40, [(5, 8)])
    assert parts["positions"].parameters == 12 * 8


def test_an_untied_head_and_ngram_tables_are_modules() -> None:
    parts = {part.name: part for part in summarize_modules(make_model(**VARIANTS["untied"]))}
    assert parts["head"].parameters == parts["token embedding"].parameters == 40
    assert parts["n-grams"].shapes == [(31, 8), (37, 8)]


@pytest.mark.parametrize(
    ("variant", "line"),
    [
        ("gpt2", "3 blocks, width 8, 2 heads of 4, MLP 32 gelu, layernorm, learned positions, biases, tied head"),
        (
            "llama",
            "3 blocks, width 8, 2 heads of 4 on 1 key/value heads, MLP 32 swiglu, rmsnorm, rope (theta 10000), "
            "no biases, tied head",
        ),
        (
            "untied",
            "3 blocks, width 8, 2 heads of 4, MLP 32 gelu, layernorm, learned positions, n-gram tables of 31, 37 rows, "
            "query/key norm, biases, untied head, logits capped at 30",
        ),
    ],
)
def test_the_architecture_is_one_line(variant: str, line: str) -> None:
    assert architecture(make_model(**VARIANTS[variant]).config) == line


def test_the_vocabulary_is_readable() -> None:
    assert vocabulary(char_tokenizer("\n\t a\x1bü\u202e\ud800")) == r"8 tokens (char): ⏎⇥␣a\x1bü\u202e\ud800"
    assert vocabulary(char_tokenizer("ab", unknown_token="?")) == "3 tokens (char): ab?; unknown ?"
    assert vocabulary(char_tokenizer(map(chr, range(100, 100 + SHOWN_TOKENS + 1)))).endswith(" ...")


def test_the_screen_shows_the_facts_of_the_export_and_its_run(run: Path) -> None:
    lines = words(text := screen(run / "artifacts" / "export"))
    assert lines[0] == ["20260131_142501_baseline"]
    for line in (
        "context 12 tokens",
        "vocabulary 5 tokens (char): ⏎␣abc",
        "trained on shakespeare, sha256 0123456789",
        "weights best, of step 1,500, val/loss 1.2500, train/eval_loss nan",
        "best val/loss 2.0000 at step 50",
        "run 20260131_142501_baseline, completed after 100 steps",
        "tag baseline",
        "started 2026-01-31 14:25:01 UTC",
        "git commit cccccccccc with uncommitted changes",
    ):
        assert line.split() in lines, text
    total = make_model().num_parameters()
    assert ["total", f"{total:,}", "100.0%"] in lines
    assert ["positions", "96", f"{96 / total:.1%}", "12", "x", "8"] in lines


def test_an_export_without_its_run_shows_its_own_facts(run: Path, tmp_path: Path) -> None:
    shutil.copytree(run / "artifacts" / "export", tmp_path / "sent" / "to" / "me")
    text = screen(tmp_path / "sent" / "to" / "me")
    assert "shakespeare" in text
    assert "git commit" not in text
    assert "problem" not in text


def test_a_damaged_run_json_is_reported_and_hides_nothing_else(run: Path) -> None:
    write(run / "run.json", "{")
    text = screen(run / "artifacts" / "export")
    assert "run.json cannot be read" in text
    assert "shakespeare" in text


def test_an_export_without_facts_of_its_training_is_shown(tmp_path: Path) -> None:
    save_export(tmp_path / "export", make_model(), TOKENIZER, {})
    assert "Parameters" in screen(tmp_path / "export")
