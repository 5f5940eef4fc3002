"""Certificates: exports are compared with our model in the programs that they are made for."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.formats.conftest import LLAMA_LIKE
from tests.tiny_export import char_tokenizer, save_tiny_run
from tokenizer import Tokenizer, build_tokenizer
from utils.config.settings import DataConfig
from utils.files import read_json
from utils.formats.certificate import PROMPTS
from utils.formats.source import open_source
from weights import main

pytestmark = [pytest.mark.slow, pytest.mark.xdist_group("transformers")]  # which these tests import
BYTE = build_tokenizer(DataConfig(tokenizer="byte"), [])
ENDED = char_tokenizer("\0 \nabcdefghijklmnopqrstuvwxyzüABQ:?.")


@pytest.fixture
def run(tmp_path: Path) -> Callable[..., Path]:
    def save(tokenizer: Tokenizer = BYTE, **settings: Any) -> Path:
        return save_tiny_run(tmp_path, "base", tokenizer, **{**LLAMA_LIKE, "block_size": 160, **settings})

    return save


@pytest.fixture
def few_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    """Compare 4 generated tokens instead of 64."""
    monkeypatch.setattr("utils.formats.certificate.NEW_TOKENS", 4)


def export(run: Path, *flags: str) -> int:
    return main(["export", run.name, *flags, "--runs-dir", str(run.parent)])


def test_transformers_agrees_with_our_model(
    run: Callable[..., Path], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    made = run(n_kv_head=1)
    assert export(made, "--format", "hf", "--dtype", "bfloat16") == 0
    folder = made / "artifacts" / "hf"
    certificate = read_json(folder / "certificate.json")
    assert certificate["agrees"]
    (found,) = certificate["engines"]
    assert found["engine"] == "transformers"
    assert found["largest_logit_difference"] <= found["tolerance"]
    assert [prompt["name"] for prompt in found["prompts"]] == [*PROMPTS]
    for prompt in found["prompts"]:
        assert prompt["ids_equal"]
        assert prompt["ids"] == BYTE.encode(prompt["prompt"])
        assert prompt["equal_tokens"] == prompt["new_tokens"] == 64
        assert prompt["text"] == prompt["their_text"]
    assert set(certificate["weights"]) == {"model.safetensors"}
    assert "transformers 5" in capsys.readouterr().out
    monkeypatch.setattr("utils.formats.certificate.PROMPTS", {"words": PROMPTS["words"]})
    assert main(["certify", str(folder), "--runs-dir", str(made.parent), "--json"]) == 0
    again = json.loads(capsys.readouterr().out)
    assert again["weights"] == certificate["weights"]
    assert again["engines"][0]["prompts"] == found["prompts"][:1]


@pytest.mark.usefixtures("few_tokens")
def test_the_pipeline_of_transformers_continues_a_text_beyond_the_context(
    run: Callable[..., Path], capfd: pytest.CaptureFixture[str]
) -> None:
    import transformers

    made = run(ENDED, block_size=32)
    assert export(made, "--format", "hf") == 0
    assert capfd.readouterr().err == ""  # although prompts are longer than the context
    folder = made / "artifacts" / "hf"
    pipeline = transformers.pipeline("text-generation", str(folder))
    found = pipeline("the cat ", max_new_tokens=20, do_sample=False, return_full_text=False)
    source, ids = open_source("base", made.parent), ENDED.encode("the cat ")
    for _ in range(20):
        ids.append(int(source.model(torch.tensor([ids]))[0][0, -1].argmax()))
    assert found[0]["generated_text"] == ENDED.decode(ids[8:])


@pytest.mark.usefixtures("few_tokens")
def test_different_weights_and_token_ids_are_reported(
    run: Callable[..., Path], capsys: pytest.CaptureFixture[str]
) -> None:
    made = run()
    assert export(made, "--format", "hf") == 0
    folder = made / "artifacts" / "hf"
    copy = folder.rename(made.parent / "copy")
    facts = read_json(copy / "tokenizer.json")
    vocab = facts["model"]["vocab"]
    vocab["a"], vocab["b"] = vocab["b"], vocab["a"]
    (copy / "tokenizer.json").write_text(json.dumps(facts))
    config = read_json(copy / "config.json")
    (copy / "config.json").write_text(json.dumps(config | {"tie_word_embeddings": False}))
    tensors = load_file(copy / "model.safetensors")
    save_file({**tensors, "lm_head.weight": tensors["model.embed_tokens.weight"] + 1}, copy / "model.safetensors")
    capsys.readouterr()
    assert main(["certify", str(copy), "--run", "base", "--runs-dir", str(made.parent)]) == 1
    out = capsys.readouterr().out
    assert "words: token ids" in out
    assert "its weights are not those of base, which may have been trained since: lm_head.weight" in out
    assert not read_json(copy / "certificate.json")["agrees"]


@pytest.mark.usefixtures("few_tokens")
@pytest.mark.parametrize(("format", "file"), [("hf", "model.safetensors"), ("gguf", "model.gguf")])
def test_an_export_whose_weights_differ_from_its_run_is_not_certified(
    format: str,
    file: str,
    run: Callable[..., Path],
    capsys: pytest.CaptureFixture[str],
) -> None:
    made = run()
    assert export(made, "--format", format) == 0
    certify = ["certify", str(made / "artifacts" / format), "--runs-dir", str(made.parent)]
    assert main(certify) == 0
    path = made / "artifacts" / format / file
    content = bytearray(path.read_bytes())
    content[-20] ^= 0x40  # in the last tensor, which is the tied head in GGUF
    path.write_bytes(content)
    capsys.readouterr()
    assert main(certify) == 1
    assert "its weights are not those of base, which may have been trained since: " in capsys.readouterr().out
    certificate = read_json(path.parent / "certificate.json")
    assert not certificate["agrees"]
    assert certificate["other_weights"] == {"hf": "model.norm.weight", "gguf": "output.weight"}[format]


@pytest.mark.usefixtures("few_tokens")
def test_an_export_whose_weights_changed_since_its_certificate_is_not_certified_again(
    run: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    made = run()
    assert export(made, "--format", "hf") == 0
    folder = Path(shutil.copytree(made / "artifacts" / "hf", tmp_path / "alone"))
    assert main(["certify", str(folder)]) == 0
    before = read_json(folder / "certificate.json")["weights"]
    path = folder / "model.safetensors"
    content = bytearray(path.read_bytes())
    content[-20] ^= 0x40
    path.write_bytes(content)
    for _ in range(2):  # the first attempt does not change the certificate
        capsys.readouterr()
        assert main(["certify", str(folder)]) == 1
        assert "its weights are not those that were certified: model.safetensors" in capsys.readouterr().out
        assert read_json(folder / "certificate.json")["weights"] == before


@pytest.mark.usefixtures("few_tokens")
def test_an_export_that_the_engine_computes_differently_is_not_kept(
    run: Callable[..., Path], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    made = run()
    monkeypatch.setattr("utils.formats.engines.Transformers.encode", lambda self, text: [1, 2])
    assert export(made, "--format", "hf") == 1
    out = capsys.readouterr().out
    assert "words: token ids [1, 2], ours [84, 104," in out
    assert out.endswith("the export was not kept\n")
    assert [path.name for path in (made / "artifacts").iterdir()] == ["export"]


def test_onnxruntime_agrees_with_our_model(run: Callable[..., Path], capsys: pytest.CaptureFixture[str]) -> None:
    made = run(n_kv_head=1, qk_norm=True, sliding_window=20, logit_softcap=9.0)
    assert export(made, "--format", "onnx") == 0
    folder = made / "artifacts" / "onnx"
    assert "onnxruntime" in capsys.readouterr().out
    certificate = read_json(folder / "certificate.json")
    (found,) = certificate["engines"]
    assert certificate["agrees"]
    assert [prompt["equal_tokens"] for prompt in found["prompts"]] == [64] * len(PROMPTS)
    assert set(certificate["weights"]) == {"model.onnx"}
    assert {path.name for path in folder.iterdir()} == {"README.md", "certificate.json", "model.onnx", "tokenizer.json"}
    # run the code of the model card in the folder that the card names
    code = (folder / "README.md").read_text(encoding="utf-8").split("```python")[1].split("```")[0]
    subprocess.run([sys.executable, "-c", code.replace('"The "', '"cat "')], cwd=folder.parent, check=True)


def test_models_and_types_that_onnx_does_not_support_are_refused(
    run: Callable[..., Path], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    made = run(ngram_rows=(50,))
    assert export(made, "--format", "onnx") == 2
    assert "ngram_rows 50" in capsys.readouterr().err
    assert export(made, "--format", "onnx", "--dtype", "q8_0") == 2
    assert "--dtype q8_0: the format onnx supports float32" in capsys.readouterr().err
    monkeypatch.setitem(sys.modules, "onnxscript", None)
    assert export(made, "--format", "onnx") == 2
    assert "pip install onnx onnxscript" in capsys.readouterr().err
    assert [path.name for path in (made / "artifacts").iterdir()] == ["export"]


@pytest.mark.parametrize(("format", "package"), [("hf", "transformers"), ("gguf", "xllamacpp")])
def test_an_engine_that_is_not_installed_is_reported(
    format: str,
    package: str,
    run: Callable[..., Path],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    made = run()
    assert export(made, "--format", format) == 0
    out = capsys.readouterr().out
    assert "which is not installed: pip install" in out
    certificate = read_json(made / "artifacts" / format / "certificate.json")
    assert (certificate["engines"], certificate["agrees"]) == ([], None)
    assert len(certificate["weights"]) == 1


def test_a_folder_that_is_not_an_export_or_lacks_its_run_is_refused(
    tmp_path: Path, run: Callable[..., Path], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["certify", str(tmp_path)]) == 2
    assert "not written by weights.py export" in capsys.readouterr().err
    assert main(["certify", str(run() / "artifacts" / "export")]) == 2
    assert "a run's own export, which only this project reads" in capsys.readouterr().err
    assert (
        main(["export", "base", "--runs-dir", str(tmp_path), "--format", "gguf", "--out", str(tmp_path / "alone")]) == 0
    )
    assert main(["certify", str(tmp_path / "alone")]) == 2
    assert "--run RUN says which one it was made from" in capsys.readouterr().err


LLAMA_CPP = [
    *(("gpt2", "float32"), ("gpt2", "q8_0"), ("llama", "float16"), ("llama", "q8_0")),
    *((family, "float32") for family in ("llama 3", "qwen2", "qwen3")),
]


@pytest.mark.parametrize(("family", "dtype"), LLAMA_CPP)
def test_llama_cpp_agrees_with_our_model(family: str, dtype: str, run: Callable[..., Path]) -> None:
    settings: dict[str, dict[str, Any]] = {
        "gpt2": {"position": "learned", "norm": "layernorm", "mlp": "gelu_tanh", "bias": True},
        "llama": {"bias": True, "n_kv_head": 1},
        "llama 3": {"rope_scaling": "llama3", "rope_factor": 4.0, "rope_original_context": 32},
        "qwen2": {"qkv_bias": True},
        "qwen3": {"qk_norm": True, "qk_norm_weights": True},
    }
    made = run(n_embd=64, n_head=2, **settings[family])
    assert export(made, "--format", "gguf", "--dtype", dtype) == 0
    found = read_json(made / "artifacts" / "gguf" / "certificate.json")["engines"][0]
    assert (found["engine"], found["agrees"]) == ("llama.cpp", True)
    assert all(prompt["ids_equal"] for prompt in found["prompts"])
