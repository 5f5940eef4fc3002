"""The export: a round trip keeps every bit, and anything wrong with a file is reported in one clear line."""

from __future__ import annotations

import json
import os
import shutil
import stat
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from model import LanguageModel
from tests.tiny_export import char_tokenizer
from utils.checkpoints.tensors import write_tensors
from utils.config.settings import ModelConfig
from utils.errors import UserError
from utils.inference import export as export_module
from utils.inference.export import EXPORT_FILES, load_export, save_export

CPU = torch.device("cpu")
TOKENIZER = char_tokenizer("abcdefgü😀\n")
VARIANTS: dict[str, dict[str, Any]] = {
    "gpt2": {"dropout": 0.5},
    "llama": {"position": "rope", "norm": "rmsnorm", "mlp": "swiglu", "n_kv_head": 1, "bias": False},
}


def make_model(variant: str = "gpt2", seed: int = 0) -> LanguageModel:
    torch.manual_seed(seed)
    tiny = {"n_layer": 1, "n_head": 2, "n_embd": 8, "block_size": 12}
    return LanguageModel(ModelConfig(**tiny | VARIANTS[variant]), TOKENIZER.vocab_size)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A valid export."""
    save_export(tmp_path / "export", make_model(), TOKENIZER, {"run": "a", "val/loss": 1.5})
    return tmp_path / "export"


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_loaded_model_has_the_same_logits_bit_for_bit(variant: str, tmp_path: Path) -> None:
    model = make_model(variant)
    save_export(tmp_path / "artifacts" / "export", model, TOKENIZER, {"run": "a", "step": 3, "val/loss": 1.5})
    assert model.training  # as before
    loaded = load_export(tmp_path / "artifacts" / "export", CPU)
    idx = torch.randint(TOKENIZER.vocab_size, (3, 12))
    with torch.no_grad():
        assert torch.equal(loaded.model(idx)[0], model.eval()(idx)[0])
    assert loaded.model.config == model.config
    assert not loaded.model.training
    assert loaded.tokenizer.to_json() == TOKENIZER.to_json()
    assert loaded.training == {"run": "a", "step": 3, "val/loss": 1.5}


def test_the_export_is_three_files(folder: Path) -> None:
    assert {path.name for path in folder.iterdir()} == set(EXPORT_FILES)
    assert [path.name for path in folder.parent.iterdir()] == ["export"]


@pytest.mark.parametrize(("mask", "mode"), [(0o002, 0o664), (0o022, 0o644), (0o077, 0o600)])
def test_the_files_have_the_permissions_that_the_umask_allows(tmp_path: Path, mask: int, mode: int) -> None:
    before = os.umask(mask)
    try:
        save_export(tmp_path / "export", make_model(), TOKENIZER, {"run": "a"})
    finally:
        os.umask(before)
    assert {stat.S_IMODE(path.stat().st_mode) for path in (tmp_path / "export").iterdir()} == {mode}


def test_the_tied_weight_is_stored_once(folder: Path) -> None:
    model, weights = make_model(), load_file(folder / "model.safetensors")
    assert [name for name, w in weights.items() if w.shape == (TOKENIZER.vocab_size, 8)] == ["token_embedding.weight"]
    assert sum(w.numel() for w in weights.values()) == model.num_parameters()
    size = (folder / "model.safetensors").stat().st_size
    assert 4 * model.num_parameters() < size < 4 * model.num_parameters() + 2000


def test_a_loaded_model_may_be_trained_and_its_file_replaced(folder: Path) -> None:
    """The weights are the file, mapped into memory; neither changes with the other."""
    before, model = (folder / "model.safetensors").read_bytes(), load_export(folder, CPU).model
    first = model.token_embedding.weight.detach().clone()
    with torch.no_grad():
        model.token_embedding.weight.add_(1)
    assert (folder / "model.safetensors").read_bytes() == before
    save_export(folder, make_model(seed=1), TOKENIZER, {"run": "b"})
    assert torch.equal(model.token_embedding.weight, first + 1)


def test_the_weights_of_an_older_export_are_aligned_for_the_kernels(folder: Path) -> None:
    """Older exports were written by safetensors, with a header of any length."""
    path = folder / "model.safetensors"
    for length in range(1, 9):
        save_file(load_file(path), path, metadata={"format": "pt", "note": "x" * 8 * length})
        config = json.loads((folder / "config.json").read_text())
        config["weights_crc32"] = f"{zlib.crc32(path.read_bytes()):08x}"
        (folder / "config.json").write_text(json.dumps(config))
        model = load_export(folder, CPU).model
        assert all(weight.data_ptr() % 64 == 0 for weight in model.parameters())


def test_an_export_can_be_moved(folder: Path, tmp_path: Path) -> None:
    shutil.move(folder, tmp_path / "elsewhere")
    assert load_export(tmp_path / "elsewhere", CPU).training["run"] == "a"


def test_a_second_export_replaces_the_first(folder: Path) -> None:
    newer = make_model(seed=1)
    save_export(folder, newer, TOKENIZER, {"run": "b"})
    loaded = load_export(folder, CPU)
    assert loaded.training == {"run": "b"}
    assert torch.equal(loaded.model.token_embedding.weight, newer.token_embedding.weight)


def fail_on_write(*_args: object, **_options: object) -> None:
    raise OSError(28, "No space left on device")


def lose_a_bit(path: Path, weights: dict[str, torch.Tensor], metadata: dict[str, str]) -> dict[str, Any]:
    weights["token_embedding.weight"] = weights["token_embedding.weight"] * 1.01
    return write_tensors(path, weights, metadata)


@pytest.mark.parametrize(
    ("name", "replacement", "error"),
    [
        ("write_tensors", fail_on_write, OSError),
        ("write_json", fail_on_write, OSError),
        ("write_tensors", lose_a_bit, RuntimeError),
    ],
    ids=["weights", "config", "logits"],
)
def test_a_failed_save_leaves_the_older_export(
    folder: Path,
    name: str,
    replacement: Callable[..., None],
    error: type[Exception],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(export_module, name, replacement)
    with pytest.raises(error):
        save_export(folder, make_model(seed=1), TOKENIZER, {"run": "b"})
    assert load_export(folder, CPU).training["run"] == "a"
    assert [path.name for path in folder.parent.iterdir()] == ["export"]


def test_a_failed_last_rename_leaves_the_older_export(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As if the process were killed just before the new export is put in place."""
    monkeypatch.setattr(Path, "rename", fail_on_write)
    monkeypatch.setattr(Path, "replace", fail_on_write)
    with pytest.raises(OSError, match="No space"):
        save_export(folder, make_model(seed=1), TOKENIZER, {"run": "b"})
    assert load_export(folder, CPU).training["run"] == "a"


# ------------------------------------------------------------------------------- damage


def error_of(folder: Path) -> str:
    """The message of the error of load_export, which is one line."""
    with pytest.raises(UserError) as caught:
        load_export(folder, CPU)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize("name", EXPORT_FILES)
def test_a_missing_file_is_named(folder: Path, name: str) -> None:
    (folder / name).unlink()
    message = error_of(folder)
    assert str(folder) in message
    assert f"{name} missing" in message


def test_a_missing_folder_is_named(tmp_path: Path) -> None:
    assert str(tmp_path / "nowhere") in error_of(tmp_path / "nowhere")


@pytest.mark.parametrize("name", EXPORT_FILES)
@pytest.mark.parametrize("share", [0.0, 0.01, 0.5, 0.99])
def test_a_truncated_file_is_named(folder: Path, name: str, share: float) -> None:
    data = (folder / name).read_bytes()
    (folder / name).write_bytes(data[: int(len(data) * share)])
    assert str(folder / name) in error_of(folder)


@pytest.mark.parametrize(
    "change",
    [
        {"training": []},
        {"training": None},
        {"training": {"val/loss": "abc"}},
        {"training": {"val/loss": None}},
        {"vocab_size": True},
    ],
    ids=str,
)
def test_a_file_with_facts_of_the_wrong_type_is_named(folder: Path, change: dict[str, Any]) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    assert str(path) in error_of(folder)


@pytest.mark.parametrize("name", ["config.json", "tokenizer.json"])
def test_a_file_with_endless_nesting_is_named(folder: Path, name: str) -> None:
    (folder / name).write_text("[" * 100_000)
    assert str(folder / name) in error_of(folder)


@pytest.mark.parametrize("place", [0.0, 0.02, 0.3, 0.6, 0.999])
def test_one_flipped_bit_in_the_weights_is_found(folder: Path, place: float) -> None:
    path = folder / "model.safetensors"
    data = bytearray(path.read_bytes())
    data[int(len(data) * place)] ^= 1
    path.write_bytes(data)
    message = error_of(folder)
    assert str(path) in message


def change_weights(folder: Path, change: Callable[[dict[str, torch.Tensor]], Any]) -> None:
    weights = load_file(folder / "model.safetensors")
    change(weights)
    save_file(weights, folder / "model.safetensors")


@pytest.mark.parametrize(
    ("change", "difference"),
    [
        (lambda w: w.pop("final_norm.weight"), "final_norm.weight is missing"),
        (lambda w: w.update(extra=torch.zeros(2)), "extra is unexpected"),
        (
            lambda w: w.update({"final_norm.weight": torch.zeros(9)}),
            "final_norm.weight has shape (9,), expected (8,)",
        ),
    ],
    ids=["missing", "unexpected", "shape"],
)
def test_weights_that_do_not_fit_are_named(
    folder: Path, change: Callable[[dict[str, torch.Tensor]], Any], difference: str
) -> None:
    change_weights(folder, change)
    message = error_of(folder)
    assert difference in message
    assert str(folder / "model.safetensors") in message
    assert "more)" not in message


def test_many_differences_are_counted(folder: Path) -> None:
    change_weights(folder, lambda weights: [weights.pop(name) for name in sorted(weights)[:5]])
    message = error_of(folder)
    assert message.count("is missing") == 3
    assert "(and 2 more)" in message


def change_json(path: Path, **changes: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_text(encoding="utf-8")) | changes), encoding="utf-8")


@pytest.mark.parametrize("version", [0, 2, "1", None])
def test_another_format_version_is_refused(folder: Path, version: object) -> None:
    change_json(folder / "config.json", format_version=version)
    assert error_of(folder) == f"{folder / 'config.json'}: format version {version}, this workbench reads 1"


@pytest.mark.parametrize(
    ("changes", "hint"),
    [
        ({"model": None}, ""),
        ({"model": []}, ""),
        ({"model": {"n_layer": "many"}}, "n_layer"),
        ({"model": {"n_layers": 2}}, "n_layers"),
        ({"model": {"n_embd": 10, "n_head": 4}}, "n_embd"),
        ({"vocab_size": None}, ""),
        ({"vocab_size": "ten"}, "ten"),
        ({"vocab_size": -1}, ""),
    ],
    ids=str,
)
def test_a_damaged_setting_in_config_json_is_an_error_that_names_the_file(
    folder: Path, changes: dict[str, Any], hint: str
) -> None:
    change_json(folder / "config.json", **changes)
    message = error_of(folder)
    assert str(folder / "config.json") in message
    assert hint in message


@pytest.mark.parametrize("key", ["format_version", "model", "vocab_size", "weights_crc32", "training"])
def test_a_key_missing_from_config_json_is_named(folder: Path, key: str) -> None:
    path = folder / "config.json"
    config = json.loads(path.read_text(encoding="utf-8"))
    del config[key]
    path.write_text(json.dumps(config), encoding="utf-8")
    message = error_of(folder)
    assert str(path) in message
    assert key in message


@pytest.mark.parametrize("name", ["config.json", "tokenizer.json"])
@pytest.mark.parametrize("content", [b"{", b"[]", b"null", b"3", b"\xff\xfe", b"{}"], ids=str)
def test_a_damaged_json_file_is_named(folder: Path, name: str, content: bytes) -> None:
    (folder / name).write_bytes(content)
    assert str(folder / name) in error_of(folder)


def test_the_tokenizer_of_another_run_is_refused(folder: Path) -> None:
    char_tokenizer("ab").save(folder / "tokenizer.json")
    message = error_of(folder)
    assert str(folder) in message
    assert f"the tokenizer has 2 tokens, the model {TOKENIZER.vocab_size}" in message


def test_a_model_too_large_for_memory_is_refused_before_it_is_built(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"vocab_size": 10**12}))
    with pytest.raises(UserError, match=r"token_embedding\.weight has shape"):
        load_export(folder, CPU)
