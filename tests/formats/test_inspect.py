"""weights.py inspect and diff: what the headers of files describe, and how their numbers differ."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import foreign_models as foreign
import pytest
import torch
from conftest import ROOT
from safetensors.torch import save_file

import weights

Capture = pytest.CaptureFixture[str]


@pytest.fixture
def file(tmp_path: Path) -> Path:
    torch.manual_seed(0)
    tensors = {f"blocks.{layer}.mlp.up.weight": torch.randn(8, 4) for layer in range(12)}
    tensors |= {"token_embedding.weight": torch.randn(11, 4), "step": torch.tensor(3), "none": torch.zeros(0, 4)}
    tensors["half"] = torch.tensor([0.0, math.nan, math.inf, -2.0]).bfloat16()
    save_file(tensors, tmp_path / "model.safetensors")
    return tmp_path / "model.safetensors"


def answer(capsys: Capture, *words: Any, status: int = 0) -> Any:
    assert weights.main([str(word) for word in words]) == status
    printed = capsys.readouterr()
    if status:
        assert printed.err.count("\n") == 1
        return printed.err
    return json.loads(printed.out) if "--json" in words else printed.out


def test_layers_of_the_same_shape_are_one_row(file: Path, capsys: Capture) -> None:
    out = answer(capsys, "inspect", file)
    assert "433 parameters in 16 tensors" in out
    assert any(line.split()[:5] == ["blocks.[0-11].mlp.up.weight", "8", "x", "4", "F32"] for line in out.splitlines())
    found = answer(capsys, "inspect", file.parent, "--json")
    assert found["parameters"] == 433
    assert found["modules"]["blocks.11"] == {"tensors": 1, "parameters": 32, "bytes": 128}
    assert found["tensors"]["step"].items() >= {"dtype": "I64", "shape": [], "elements": 1, "bytes": 8}.items()


def test_stats_omit_columns_that_would_be_empty(tmp_path: Path, capsys: Capture) -> None:
    name = "model.layers.10.self_attn.q_proj.weight"
    save_file({name: torch.ones(4096, 4096, dtype=torch.bfloat16)}, tmp_path / "model.safetensors")
    header, row = answer(capsys, "inspect", tmp_path, "--stats").splitlines()[2:]
    assert header.split() == ["tensor", "shape", "norm", "largest"]
    assert row.split()[0] == name  # in one piece, in a terminal of 80 columns


def test_stats_equal_a_computation_by_torch(file: Path, capsys: Capture) -> None:
    from safetensors.torch import load_file

    found = answer(capsys, "inspect", file, "--stats", "--json")["tensors"]
    for name, tensor in load_file(file).items():
        kept = tensor.double()[tensor.double().isfinite()]
        assert found[name]["norm"] == pytest.approx(float(kept.norm()))
        assert found[name]["largest"] == (float(kept.abs().max()) if len(kept) else 0.0)
        assert found[name]["zeros"] == int((tensor == 0).sum())
        assert found[name]["nonfinite"] == tensor.numel() - len(kept)
    assert "2 numbers not finite" in answer(capsys, "inspect", file, "--stats")


def test_headers_are_read_without_torch_and_in_little_memory(file: Path) -> None:
    with file.open("r+b") as opened:  # 3 GB of numbers that nobody reads
        header = {"a": {"dtype": "F32", "shape": [3 << 28], "data_offsets": [0, 3 << 30]}}
        text = json.dumps(header).encode()
        opened.write(len(text).to_bytes(8, "little") + text)
        opened.truncate(8 + len(text) + (3 << 30))
    code = (
        "import sys; sys.modules.update(dict.fromkeys(['torch', 'numpy', 'pydantic', 'yaml']))\n"
        "import weights; assert weights.main(['inspect', sys.argv[1]]) == 0\n"
        "print(next(line for line in open('/proc/self/status') if line.startswith('VmHWM')).split()[1])"
    )
    result = subprocess.run([sys.executable, "-c", code, file], cwd=ROOT, capture_output=True, text=True, check=True)
    assert "805,306,368 parameters" in result.stdout
    assert int(result.stdout.split()[-1]) < 100_000  # KB


def test_shards_are_one_set_of_weights(file: Path, tmp_path: Path, capsys: Capture) -> None:
    folder = tmp_path / "sharded"
    folder.mkdir()
    save_file({"a": torch.ones(2)}, folder / "model-1.safetensors")
    save_file({"b": torch.ones(3)}, folder / "model-2.safetensors")
    index = {"weight_map": {"a": "model-1.safetensors", "b": "model-2.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    assert answer(capsys, "inspect", f"hf:{folder}", "--json")["parameters"] == 5
    for bad in ("../model.safetensors", "/etc/passwd", 5):
        (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": bad}}))
        assert "model.safetensors.index.json: " in answer(capsys, "inspect", folder, status=2)
    (folder / "model.safetensors.index.json").write_text("[" * 100_000)
    assert "nested too deeply" in answer(capsys, "inspect", folder, status=2)


def test_the_cache_of_the_hub_is_found_without_a_network(
    file: Path, tmp_path: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "hub"))
    model = tmp_path / "hub" / "models--owner--small"
    assert "weights.py download owner/small" in answer(capsys, "inspect", "hf:owner/small", status=2)
    (model / "snapshots" / "abc123").mkdir(parents=True)
    (model / "refs").mkdir()
    (model / "refs" / "main").write_text("abc123")
    (model / "blob").write_bytes(file.read_bytes())
    (model / "snapshots" / "abc123" / "model.safetensors").symlink_to(model / "blob")
    assert answer(capsys, "inspect", "hf:owner/small", "--json")["parameters"] == 433
    (model / "refs" / "main").write_text("../../../x")
    assert "is not on this machine" in answer(capsys, "inspect", "hf:owner/small", status=2)
    assert "expected a folder, or OWNER/NAME" in answer(capsys, "inspect", "hf:../../x", status=2)


def test_files_of_llm_c_and_llama2_c_are_inspected(tmp_path: Path, capsys: Capture) -> None:
    foreign.write_llm_c(tmp_path / "gpt2.bin", foreign.gpt2(), 5)
    found = answer(capsys, "inspect", tmp_path / "gpt2.bin", "--json")["tensors"]
    assert found["h.*.attn.c_attn.weight"]["shape"] == [foreign.L, 3 * foreign.C, foreign.C]
    assert found["wte"]["dtype"] == "BF16"
    foreign.write_llama2_c(tmp_path / "model.bin", foreign.llama(), 0)
    assert "layers.*.w1" in answer(capsys, "inspect", tmp_path / "model.bin")


def test_files_without_weights_are_refused_with_a_reason(tmp_path: Path, capsys: Capture) -> None:
    torch.save({}, tmp_path / "pytorch_model.bin")
    assert "a pickle can run code" in answer(capsys, "inspect", tmp_path, status=2)
    assert "expected safetensors, or a model of" in answer(capsys, "inspect", tmp_path / "pytorch_model.bin", status=2)
    (tmp_path / "empty").mkdir()
    assert "no weights: expected model.safetensors" in answer(capsys, "inspect", tmp_path / "empty", status=2)
    assert "no run" in answer(capsys, "inspect", "nothing", "--runs-dir", tmp_path, status=2)


def test_diff_reports_which_layers_changed_and_by_how_much(file: Path, tmp_path: Path, capsys: Capture) -> None:
    from safetensors.torch import load_file

    tensors = load_file(file)
    moved = tensors["blocks.3.mlp.up.weight"].clone()
    moved[0, 0] += 0.5
    other = {**tensors, "blocks.3.mlp.up.weight": moved, "new": torch.ones(2), "half": tensors["half"].float()}
    other["token_embedding.weight"] = torch.zeros(12, 4)
    del other["step"]
    save_file(other, tmp_path / "other.safetensors")
    found = answer(capsys, "diff", file, tmp_path / "other.safetensors", "--json")
    change = found["tensors"]["blocks.3.mlp.up.weight"]
    assert change["changed"] == 1
    assert change["largest"] == pytest.approx(0.5)
    assert change["relative"] == pytest.approx(0.5 / float(tensors["blocks.3.mlp.up.weight"].norm()))
    assert [name for name, layer in found["layers"].items() if layer["changed"]] == ["blocks.3"]
    assert (found["only_a"], found["only_b"], found["equal"]) == (["step"], ["new"], False)
    assert found["shapes"] == {"token_embedding.weight": [[11, 4], [12, 4]]}
    assert found["types"] == {"half": ["BF16", "F32"]}
    assert found["tensors"]["half"]["changed"] == 0  # nan and nan are equal
    out = answer(capsys, "diff", file, tmp_path / "other.safetensors")
    assert "1 of 14 tensors differ, " in out
    assert "token_embedding.weight: shape 11 x 4, now 12 x 4" in out
    assert "equal: 433 numbers in 16 tensors" in answer(capsys, "diff", file, file)


def test_stats_computed_in_parts_are_the_same(file: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = answer(capsys, "inspect", file, "--stats", "--json")
    monkeypatch.setattr("utils.formats.numbers.PART_ELEMENTS", 7)
    parts = answer(capsys, "inspect", file, "--stats", "--json")["tensors"]
    for name, found in whole["tensors"].items():
        assert parts[name]["norm"] == pytest.approx(found["norm"])
        assert parts[name]["zeros"] == found["zeros"]


def test_a_change_that_is_not_finite_is_counted(tmp_path: Path, capsys: Capture) -> None:
    save_file({"a": torch.tensor([1.0, 2.0])}, tmp_path / "a.safetensors")
    save_file({"a": torch.tensor([1.0, math.nan])}, tmp_path / "b.safetensors")
    found = answer(capsys, "diff", tmp_path / "a.safetensors", tmp_path / "b.safetensors", "--json")["tensors"]["a"]
    assert (found["changed"], found["nonfinite"], found["largest"]) == (1, 1, 0.0)
