"""Mistakes in the flags of weights.py name the flag."""

from __future__ import annotations

import sys
from pathlib import Path

import foreign_models as foreign
import pytest

from tests.tiny_export import save_tiny_run
from weights import main

EXPORT = ("export", "base", "--format")
CONVERT = ("convert", "model.bin", "--out", "runs/new")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ((*EXPORT, "hf", "--shard-size", "none"), "--shard-size: expected a size like 20GB or 500MiB, got 'none'"),
        ((*EXPORT, "hf", "--shard-size", "0MB"), "--shard-size: expected a size above 0, got '0MB'"),
        ((*EXPORT, "gguf", "--shard-size", "1GB"), "--shard-size: only the format hf is split into files, not gguf"),
        ((*EXPORT, "onnx", "--dtype", "float16"), "--dtype float16: the format onnx supports float32"),
        (("certify", "out", "--run", "nothing"), "--run: no run nothing in "),
        ((*CONVERT, "--tokenizer", "chars"), "--tokenizer chars: expected char, byte, bpe, gpt2, hf:PATH or a tokeniz"),
        ((*CONVERT, "--tokenizer", "hf:no"), "--tokenizer hf:no: expected char, byte, bpe, gpt2, hf:PATH or a tokeniz"),
        ((*CONVERT, "--tokenizer", "model.bin"), "--tokenizer: model.bin: damaged tokenizer file"),
        (
            (*CONVERT, "--tokenizer", "char", "--dataset", "no"),
            "--dataset: unknown dataset no: no such file or folder; expected ",
        ),
        (("convert", "model.bin", "--out", "."), "--out .: expected the name of a new run"),
    ],
)
def test_a_mistake_in_a_flag_names_the_flag(
    words: tuple[str, ...],
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(sys.modules, "transformers", None)  # its import takes seconds
    save_tiny_run(tmp_path / "runs", "base")
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "config.json").write_text("{}")
    foreign.write_llama2_c(tmp_path / "model.bin", foreign.llama(), 1)
    assert main([*words, "--runs-dir", str(tmp_path / "runs")]) == 2
    assert capsys.readouterr().err.startswith(f"error: {message}")
    assert [path.name for path in (tmp_path / "runs").iterdir()] == ["base"]
