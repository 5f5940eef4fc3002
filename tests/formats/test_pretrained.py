"""Folders of models: their content, and what is refused when they are written or read."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.formats.conftest import LLAMA_LIKE
from tests.tiny_export import TOKENIZER, char_tokenizer, save_tiny_run, tiny_model
from tokenizer import Tokenizer, build_tokenizer
from utils.config.settings import DataConfig
from utils.errors import UserError
from utils.files import read_json
from utils.formats.card import MADE_HERE
from utils.formats.exports import export_as
from utils.formats.foreign_config import ForeignConfig
from utils.formats.huggingface import export_huggingface
from utils.formats.mistral import read as read_mistral
from utils.formats.pretrained import open_pretrained
from utils.formats.qwen import read_qwen2
from utils.formats.source import Source, open_source
from utils.formats.stored import find_weights
from utils.formats.table import FormatError
from weights import main


def byte() -> Tokenizer:
    return build_tokenizer(DataConfig(tokenizer="byte"), [])


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "n-grams": ({"position": "learned", "ngram_rows": (5,)}, r"GPT2LMHeadModel, cannot hold: ngram_rows \(5,\)"),
    "softcap": (LLAMA_LIKE | {"logit_softcap": 30.0}, "LlamaForCausalLM, cannot hold: logit_softcap 30"),
    "grouped gpt-2": ({"position": "learned", "n_kv_head": 1}, "GPT2LMHeadModel, cannot hold: n_kv_head 1"),
    "rope and gelu": ({"norm": "rmsnorm", "bias": False}, "cannot hold: mlp gelu"),
    "partial window": (LLAMA_LIKE | {"sliding_window": 2, "full_attention_layers": 1}, "cannot hold: sliding_window 2"),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_settings_that_no_family_can_hold_are_refused_before_anything_is_written(kind: str, tmp_path: Path) -> None:
    settings, message = REFUSED[kind]
    with pytest.raises(FormatError, match=message):
        export_huggingface(Source("ours", tiny_model(**settings), TOKENIZER), tmp_path / "out")
    assert not any(tmp_path.iterdir())


def test_half_a_surrogate_pair_as_a_token_is_refused(tmp_path: Path) -> None:
    ours = char_tokenizer(["a", "\ud800"])
    with pytest.raises(UserError, match="half a surrogate pair"):
        export_huggingface(Source("ours", tiny_model(ours, position="learned"), ours), tmp_path / "out")
    assert not any(tmp_path.iterdir())


def test_the_command_writes_shards_of_a_dtype_and_a_card(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = save_tiny_run(tmp_path, "20260101_000000_base", position="learned", dropout=0.2)
    (run / "run.json").write_text(
        json.dumps(
            {
                "id": run.name,
                "start": "2026-01-31T14:25:01.000+00:00",
                "git": {"commit": "abc123", "dirty": True},
                "resolved": {"dataset": "a | b", "train_tokens": 12345, "torch": "2.9"},
            }
        )
    )
    flags = ["--dtype", "bfloat16", "--shard-size", "5KB", "--license", "mit", "--runs-dir", str(tmp_path)]
    assert main(["export", "base", "--format", "hf", *flags]) == 0
    out = run / "artifacts" / "hf"
    assert "GPT2LMHeadModel" in capsys.readouterr().out
    index = read_json(out / "model.safetensors.index.json")
    assert len(set(index["weight_map"].values())) > 2
    assert all((out / name).stat().st_size < 8_000 for name in index["weight_map"].values())
    opened = open_pretrained(out)
    assert opened.get("transformer.wte.weight").dtype == torch.bfloat16
    assert read_json(out / "config.json")["torch_dtype"] == "bfloat16"
    card = (out / "README.md").read_text(encoding="utf-8")
    for words in ("license: mit", "abc123, with uncommitted changes", "a \\| b, 12,345 training tokens", "1.5000 nats"):
        assert words in card
    assert not list(out.parent.glob(".*"))
    assert main(["export", "base", "--format", "hf", "--runs-dir", str(tmp_path)]) == 0  # replaces it
    assert not (out / "model.safetensors.index.json").exists()


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({"thesis.txt": "text"}, "exists and is not an export"),
        ({"README.md": "# My project", "thesis.txt": "text"}, "exists and is not an export"),
        ({"README.md": MADE_HERE, ".git": "kept"}, r"exists and has \.git, which does not belong to an export"),
    ],
)
def test_an_export_never_replaces_something_else(files: dict[str, str], message: str, tmp_path: Path) -> None:
    source = Source("ours", tiny_model(position="learned"), TOKENIZER)
    (tmp_path / "out").mkdir()
    for name, text in files.items():
        (tmp_path / "out" / name).write_text(text)
    with pytest.raises(UserError, match=message):
        export_huggingface(source, tmp_path / "out")
    assert {path.name: path.read_text() for path in (tmp_path / "out").iterdir()} == files
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    (tmp_path / "link").symlink_to(tmp_path / "file")
    (tmp_path / "file").write_text("text")
    for name in ("link", "file"):
        with pytest.raises(UserError, match="exists and is not an export"):
            export_huggingface(source, tmp_path / name)


def test_two_exports_to_one_place_do_not_mix(tmp_path: Path) -> None:
    source = Source("ours", tiny_model(position="learned"), TOKENIZER)

    def second(folder: Path) -> None:
        with pytest.raises(UserError, match="another process is writing an export there"):
            export_huggingface(source, tmp_path / "out", dtype=torch.float16)

    export_huggingface(source, tmp_path / "out", check=second)
    assert open_pretrained(tmp_path / "out").get("transformer.wte.weight").dtype == torch.float32
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_remains_of_a_killed_export_are_not_part_of_the_next(tmp_path: Path) -> None:
    source = Source("ours", tiny_model(position="learned"), TOKENIZER)
    (tmp_path / ".out.tmp" / "folder").mkdir(parents=True)
    (tmp_path / ".out.tmp" / "model-00001-of-00009.safetensors").write_text("half")
    export_huggingface(source, tmp_path / "out")
    assert not list((tmp_path / "out").glob("*-of-*"))
    assert not (tmp_path / "out" / "folder").exists()
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_numbers_that_a_type_cannot_hold_are_refused_before_anything_is_written(tmp_path: Path) -> None:
    source = Source("ours", tiny_model(position="learned"), TOKENIZER)
    with torch.no_grad():
        source.model.final_norm.weight[3] = 1e5
    with pytest.raises(FormatError, match=r"float16 cannot hold final_norm.weight: its largest number is 1e\+05"):
        export_as(source, "hf", tmp_path / "out", "float16", 1 << 30, None)
    with torch.no_grad():
        source.model.final_norm.weight[3] = torch.nan
    for format in ("hf", "gguf", "onnx"):
        with pytest.raises(FormatError, match=r"final_norm.weight has numbers that are not finite"):
            export_as(source, format, tmp_path / "out", "float32", 1 << 30, None)
    assert not any(tmp_path.iterdir())


def test_an_export_outside_a_run_needs_out(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = save_tiny_run(tmp_path / "runs", "base", position="learned")
    alone = (run / "artifacts" / "export").rename(tmp_path / "alone")
    assert main(["export", str(alone), "--format", "hf"]) == 2
    assert "--out DIR says where to write" in capsys.readouterr().err
    assert main(["export", str(alone), "--format", "hf", "--out", str(tmp_path / "there")]) == 0
    assert open_source(str(alone), tmp_path).name == "alone"


def test_an_error_leaves_the_older_export(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = Source("ours", tiny_model(position="learned"), TOKENIZER)
    export_huggingface(source, tmp_path / "out")
    before = {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()}

    def fail(*_: Any) -> float:
        raise RuntimeError("other logits")

    monkeypatch.setattr("utils.formats.huggingface.check_written", fail)
    with pytest.raises(RuntimeError):
        export_huggingface(source, tmp_path / "out", dtype=torch.float16)
    assert {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()} == before
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


# ------------------------------------------------------------------------------- what is refused when it is read


def model_folder(folder: Path, **changes: Any) -> Path:
    """An export whose config.json has other values; None removes a key."""
    export_huggingface(Source("ours", tiny_model(position="learned"), TOKENIZER), folder)
    config = read_json(folder / "config.json") | changes
    (folder / "config.json").write_text(json.dumps({key: value for key, value in config.items() if value is not None}))
    return folder


CONFIGS: dict[str, tuple[dict[str, Any], str]] = {
    "smollm 3": ({"architectures": ["SmolLM3ForCausalLM"]}, "architectures: expected one of GPT2LMHeadModel, "),
    "other family": ({"architectures": ["GPTNeoXForCausalLM"]}, "architectures: expected one of GPT2LMHeadModel, "),
    "own code": ({"auto_map": {"AutoModel": "evil.Model"}}, "auto_map: expected none: the model brings its own code"),
    "quantized": ({"quantization_config": {"bits": 4}}, "quantization_config: expected none: its weights are"),
    "unusual attention": ({"scale_attn_by_inverse_layer_idx": True}, "scale_attn_by_inverse_layer_idx: expected false"),
    "activation": ({"activation_function": "tanh"}, "activation_function: expected gelu_new or .*, got 'tanh'"),
    "text for a number": ({"n_embd": "wide"}, "n_embd: expected a whole number >= 1, got 'wide'"),
    "negative": ({"n_layer": -1}, "n_layer: expected a whole number >= 1, got -1"),
    "huge width": ({"n_embd": 10**15}, "n_embd: .*less than or equal to 65536"),
    "huge vocabulary": ({"vocab_size": 10**12}, "vocab_size: expected at most 4,194,304"),
    "many blocks": ({"n_layer": 1024}, "describes a model of at least"),
    "wide mlp": ({"n_inner": 10**12}, "describes a model of at least"),
    "other shape": ({"n_positions": 17}, r"wpe.weight has shape \(16, 16\), config.json says \(17, 16\)"),
    "one block too few": ({"n_layer": 1}, "tensors that our model of GPT2LMHeadModel does not have: transformer.h.1"),
    "untied": ({"tie_word_embeddings": False}, "lm_head.weight is missing"),
}


@pytest.mark.parametrize("kind", CONFIGS)
def test_a_configuration_that_we_cannot_represent_is_refused_by_name(kind: str, tmp_path: Path) -> None:
    changes, message = CONFIGS[kind]
    folder = model_folder(tmp_path / "model", **changes)
    with pytest.raises(UserError, match=message):
        open_pretrained(folder)


def test_unknown_keys_are_reported(tmp_path: Path) -> None:
    assert open_pretrained(model_folder(tmp_path / "model", flux=3)).unknown == ["flux"]


def test_only_safetensors_inside_the_folder_are_read(tmp_path: Path) -> None:
    folder = model_folder(tmp_path / "model")
    weights = (folder / "model.safetensors").rename(tmp_path / "elsewhere.safetensors")
    (folder / "pytorch_model.bin").write_bytes(b"cos\nsystem\n(S'touch /tmp/pwned'\ntR.")
    with pytest.raises(FormatError, match=r"pytorch_model.bin is a pickle, which can run any code"):
        open_pretrained(folder)
    (folder / "pytorch_model.bin").unlink()
    with pytest.raises(FormatError, match=r"no weights: expected model.safetensors"):
        open_pretrained(folder)
    (folder / "model.safetensors").symlink_to(weights)
    with pytest.raises(FormatError, match="leads out of"):
        open_pretrained(folder)
    (folder / "model.safetensors").unlink()
    for name in ("../elsewhere.safetensors", "/etc/passwd", str(weights), "x.bin", 3):
        index = {"weight_map": {"transformer.wte.weight": name}}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index))
        with pytest.raises(FormatError, match=r"expected the name of a .safetensors file beside it"):
            open_pretrained(folder)


LLAMA_KEYS = {"num_hidden_layers": 32, "hidden_size": 64, "intermediate_size": 64, "num_attention_heads": 4}
LINEAR = {"rope_type": "linear", "factor": 4.0}


def test_missing_values_are_the_defaults_of_transformers() -> None:
    qwen2 = read_qwen2(ForeignConfig({**LLAMA_KEYS, "use_sliding_window": True}, "config.json"))
    assert (qwen2["sliding_window"], qwen2["full_attention_layers"]) == (4096, 28)
    assert "sliding_window" not in read_qwen2(ForeignConfig({**LLAMA_KEYS, "sliding_window": 8}, "config.json"))
    mistral = read_mistral(ForeignConfig(LLAMA_KEYS, "config.json"))
    assert (mistral["sliding_window"], mistral["n_kv_head"]) == (4096, 8)
    assert read_mistral(ForeignConfig({**LLAMA_KEYS, "sliding_window": None}, "config.json"))["sliding_window"] is None


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"max_window_layers": True}, "max_window_layers: expected a whole number >= 0, got True"),
        ({"max_window_layers": -1}, "max_window_layers: expected a whole number >= 0, got -1"),
        (
            {"rope_parameters": {"rope_type": "default", "rope_theta": 100.0}, "rope_scaling": LINEAR},
            "rope_scaling: expected the same as rope_parameters, or one of the two",
        ),
        ({"rope_scaling": {**LINEAR, "rope_type": "dynamic"}}, "rope_scaling.rope_type: expected default or linear"),
        ({"layer_types": ["full_attention", "linear_attention"]}, "layer_types: expected full_attention only"),
    ],
)
def test_keys_of_later_families_are_refused_by_their_own_name(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        read_qwen2(ForeignConfig({**LLAMA_KEYS, **changes}, "config.json"))


def rewrite(folder: Path, change: Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]]) -> None:
    weights = {name: tensor.clone() for name, tensor in load_file(folder / "model.safetensors").items()}
    save_file(change(weights), folder / "model.safetensors")


EMBEDDING = "transformer.wte.weight"
CONTRADICTIONS: dict[str, tuple[Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]], str]] = {
    "a head of its own": (
        lambda weights: weights | {"lm_head.weight": weights[EMBEDDING] * 2},
        "lm_head.weight is not transformer.wte.weight, although tie_word_embeddings is true",
    ),
    "a head of another type": (
        lambda weights: weights | {"lm_head.weight": weights[EMBEDDING].double()},
        "lm_head.weight is not transformer.wte.weight",
    ),
    "two names": (
        lambda weights: weights | {"wte.weight": weights[EMBEDDING] * 2},
        "transformer.wte.weight appears twice, with and without transformer",
    ),
    "8-bit": (
        lambda weights: weights | {EMBEDDING: weights[EMBEDDING].to(torch.float8_e4m3fn)},
        "transformer.wte.weight: expected BF16, F16, F32, F64, got F8_E4M3",
    ),
}


@pytest.mark.parametrize("kind", CONTRADICTIONS)
def test_weights_that_could_be_read_in_two_ways_are_refused(kind: str, tmp_path: Path) -> None:
    change, message = CONTRADICTIONS[kind]
    folder = model_folder(tmp_path / "model")
    rewrite(folder, change)
    with pytest.raises(FormatError, match=message):
        open_pretrained(folder)


def test_a_head_that_equals_the_embedding_is_read(tmp_path: Path) -> None:
    folder = model_folder(tmp_path / "model")
    rewrite(folder, lambda weights: weights | {"lm_head.weight": weights[EMBEDDING].clone()})
    assert open_pretrained(folder).config.tie_embeddings


def test_a_tensor_in_two_shards_is_refused_and_a_single_file_is_preferred(tmp_path: Path) -> None:
    folder = model_folder(tmp_path / "model")
    weights = load_file(folder / "model.safetensors")
    save_file(weights, folder / "model-1.safetensors")
    save_file({EMBEDDING: weights[EMBEDDING] * 2}, folder / "model-2.safetensors")
    index = {name: "model-1.safetensors" for name in weights} | {EMBEDDING: "model-2.safetensors"}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": index}))
    assert open_pretrained(folder).shards.files == [folder / "model.safetensors"]
    assert find_weights(str(folder), lambda: tmp_path) == [folder / "model.safetensors"]
    (folder / "model.safetensors").unlink()
    with pytest.raises(FormatError, match=r"model-2.safetensors: transformer.wte.weight is in model-1.saf"):
        open_pretrained(folder)


@pytest.mark.parametrize(
    "name", ["config.json", "tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "README.md"]
)
def test_a_link_out_of_the_folder_is_not_followed(name: str, tmp_path: Path) -> None:
    folder = model_folder(tmp_path / "model")
    secret = tmp_path / "secret"
    secret.write_bytes((folder / name).read_bytes() if (folder / name).exists() else b"a key")
    (folder / name).unlink(missing_ok=True)
    (folder / name).symlink_to(secret)
    with pytest.raises(UserError, match=f"{name}: cannot be read: leads out of"):
        (opened := open_pretrained(folder)).tokenizer(), opened.facts()


HEADERS = {
    "endless": (2**62).to_bytes(8, "little") + b"{}",
    "not an object": (2).to_bytes(8, "little") + b"[]",
    "nested": (200_000).to_bytes(8, "little") + b"[" * 200_000,
    "huge shape": (lambda text: len(text).to_bytes(8, "little") + text)(
        json.dumps({"x": {"dtype": "F32", "shape": [2**40, 2**20], "data_offsets": [0, 4]}}).encode()
    )
    + b"1234",
    "empty": b"",
}


@pytest.mark.parametrize("kind", HEADERS)
def test_absurd_headers_are_refused(kind: str, tmp_path: Path) -> None:
    folder = model_folder(tmp_path / "model")
    (folder / "model.safetensors").write_bytes(HEADERS[kind])
    with pytest.raises(FormatError, match=r"model.safetensors: not a safetensors file"):
        open_pretrained(folder)


@pytest.mark.parametrize("content", [b"[" * 10_000_000, b'{"a": ' * 100_000, b"\xff", b"3", b"{}"], ids=lambda c: c[:6])
def test_damaged_json_is_refused_in_one_line(content: bytes, tmp_path: Path) -> None:
    folder = model_folder(tmp_path / "model")
    for name in ("tokenizer.json", "config.json"):
        (folder / name).write_bytes(content)
        with pytest.raises(UserError) as caught:
            open_pretrained(folder).tokenizer()
        assert "\n" not in str(caught.value)
        assert str(folder / name) in str(caught.value)


def test_a_tokenizer_with_more_tokens_than_the_model_has_rows_is_refused(tmp_path: Path) -> None:
    folder = model_folder(tmp_path / "model")
    (folder / "tokenizer.json").write_text(byte().huggingface())
    with pytest.raises(UserError, match="has 256 tokens, more than the 35 rows of the model"):
        open_pretrained(folder).tokenizer()
