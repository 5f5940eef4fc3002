"""weights.py convert makes runs from files of other programs; they compute the same and continue to train."""

from __future__ import annotations

import json
import struct
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import foreign_models as foreign
import pytest
import torch
from foreign_models import MYPT_CONFIG, NANOGPT_CONFIG, C, L, T, V

import experiments
import train
import weights
from utils.checkpoints.files import read_checkpoint
from utils.inference.export import load_export
from utils.runs.layout import CHECKPOINTS, EXPORT
from workbench import resume

TEXT = "\n abcdefghi" * 40 + "abc abc\n" * 40
IDX = torch.arange(T)[None] * 7 % V


@pytest.fixture
def run(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Any:
    """Converts files to a run, and returns the run and the output, or the error line if `status` is not 0."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "letters.txt").write_text(TEXT)

    def convert(old: Path, *words: str, status: int = 0) -> Any:
        out = tmp_path / "runs" / "converted"
        assert weights.main(["convert", str(old), "--out", str(out), *words]) == status
        printed = capsys.readouterr()
        if status:
            assert not (tmp_path / "runs").exists() or not list((tmp_path / "runs").iterdir())
            assert printed.out == ""
            assert printed.err.count("\n") == 1, printed.err
            return printed.err
        return out, printed.out

    return convert


def logits(run: Path) -> torch.Tensor:
    return load_export(run / EXPORT, torch.device("cpu")).model(IDX)[0]


def settings(run: Path) -> dict[str, Any]:
    sources = json.loads((run / "meta" / "config_sources.json").read_text())
    return {key: entry["value"] for key, entry in sources.items() if entry["source"] != "default"}


# ------------------------------------------------------------------------------------------------------- nanoGPT


def trained_nanogpt(path: Path, steps: int = 4, bias: bool = True) -> tuple[foreign.Tensors, torch.optim.AdamW]:
    p = {name: tensor.requires_grad_() for name, tensor in foreign.gpt2(bias).items()}
    optimizer = foreign.adamw_of(p)
    for _ in range(steps):
        loss = foreign.gpt2_logits(p, IDX).logsumexp(-1).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    torch.save(foreign.nanogpt_checkpoint(p, optimizer, steps, {**NANOGPT_CONFIG, "bias": bias}), path)
    return p, optimizer


@pytest.mark.parametrize("bias", [True, False])
def test_a_nanogpt_checkpoint_computes_the_same_and_keeps_its_settings(run: Any, tmp_path: Path, bias: bool) -> None:
    p, _ = trained_nanogpt(tmp_path / "ckpt.pt", bias=bias)
    made, out = run(tmp_path, "--tokenizer", "char", "--dataset", "letters.txt")
    torch.testing.assert_close(logits(made), foreign.gpt2_logits(p, IDX), rtol=0, atol=1e-5)
    found = settings(made)
    expected = {
        **{"n_layer": L, "n_embd": C, "mlp": "gelu", "bias": bias, "batch_size": 6, "gradient_accumulation_steps": 2},
        **{
            "learning_rate": 1e-3,
            "max_iters": 9,
            "warmup_iters": 2,
            "min_lr": 1e-4,
            "beta2": 0.99,
            "tokenizer": "char",
        },
    }
    assert {key: found[key] for key in expected} == expected
    sources = json.loads((made / "meta" / "config_sources.json").read_text())
    assert sources["learning_rate"]["source"] == "ckpt.pt: config: learning_rate"
    for name in ("out_dir", "wandb_project", "device", "compile", "dataset"):
        assert f"note: {name} = " in out
    assert "nanoGPT, step 4" in out
    assert f"--resume {made}" in out


@pytest.mark.parametrize("kind", ["char", "bpe"])
def test_a_tokenizer_that_is_made_from_a_text_needs_the_text(run: Any, tmp_path: Path, kind: str) -> None:
    """The dataset that configs/ names is not that text."""
    trained_nanogpt(tmp_path / "ckpt.pt")
    error = run(tmp_path, "--tokenizer", kind, status=2)
    assert error.endswith(
        f"--tokenizer {kind} is built from the text that the model was trained on: add --dataset FILE\n"
    )


def test_a_nanogpt_run_without_decay_may_have_any_min_lr(run: Any, tmp_path: Path) -> None:
    """As with nanoGPT's own config/finetune_shakespeare.py, which leaves the defaults of the decay as they are."""
    more = {"learning_rate": 3e-5, "decay_lr": False, "warmup_iters": 2000, "lr_decay_iters": 600000, "min_lr": 6e-5}
    torch.save(foreign.nanogpt_checkpoint(foreign.gpt2(), None, 3, NANOGPT_CONFIG | more), tmp_path / "ckpt.pt")
    found = settings(run(tmp_path, "--tokenizer", "char", "--dataset", "letters.txt")[0])
    assert [found[key] for key in ("schedule", "warmup_iters", "learning_rate")] == ["constant", 0, 3e-5]
    assert not found.keys() & {"min_lr", "lr_decay_iters"}


def test_a_converted_run_continues_to_train_like_nanogpt(run: Any, tmp_path: Path) -> None:
    """The updates of the resumed run are those of the same AdamW in nanoGPT's model, on the same batches."""
    p, optimizer = trained_nanogpt(tmp_path / "ckpt.pt")
    made, _ = run(tmp_path / "ckpt.pt", "--tokenizer", "char", "--dataset", "letters.txt")
    before = read_checkpoint(made / CHECKPOINTS / "step_000004")
    assert before.state["optimizer"]["state"]["token_embedding.weight"]["step"] == {
        "tensor": "token_embedding.weight/step"
    }
    assert before.optimizer_tensors["token_embedding.weight/step"] == 4

    from data import BatchSampler, load_corpus
    from utils.config.settings import DataConfig

    corpus = load_corpus(DataConfig(dataset=str(tmp_path / "letters.txt"), tokenizer="char"), T, tmp_path / "corpora")
    sampler = BatchSampler(corpus, T, 6, 1337, torch.device("cpu"))
    for step in range(4, 9):
        progress = (step - 2) / 7
        rate = 1e-4 + 0.5 * (1 + torch.cos(torch.tensor(torch.pi * progress)).item()) * 9e-4
        optimizer.zero_grad()
        for part in range(2):
            idx, targets = sampler.train_batch(step, part, 2)
            predicted = foreign.gpt2_logits(p, idx)
            loss = torch.nn.functional.cross_entropy(predicted.flatten(0, 1), targets.flatten())
            (loss / 2).backward()
        torch.nn.utils.clip_grad_norm_(list(p.values()), 1.0)
        for group in optimizer.param_groups:
            group["lr"] = rate
        optimizer.step()

    result = resume(made, quiet=True, aim_logging=False, corpora_dir=str(tmp_path / "corpora"))
    assert result.status == "completed"
    after = read_checkpoint(made / CHECKPOINTS / "step_000009")
    for ours, theirs in (
        ("blocks.1.attention.qkv.weight", "transformer.h.1.attn.c_attn.weight"),
        ("token_embedding.weight", "transformer.wte.weight"),
    ):
        torch.testing.assert_close(after.weights[ours], p[theirs].detach(), rtol=0, atol=2e-6)
    moved = (after.weights["token_embedding.weight"] - before.weights["token_embedding.weight"]).abs().max()
    assert moved > 1e-4


def test_a_run_converted_without_its_text_can_be_forked(run: Any, tmp_path: Path) -> None:
    trained_nanogpt(tmp_path / "ckpt.pt")
    text = tmp_path / "letters.txt"
    (tmp_path / "tokenizer.json").write_text(json.dumps(CHARACTERS))
    made, out = run(tmp_path / "ckpt.pt", "--tokenizer", str(tmp_path / "tokenizer.json"))
    assert "--fork" in out
    words = ["--dataset", str(text), "--max-iters", "6", "--runs-dir", str(tmp_path / "runs"), "--no-aim-logging"]
    words += ["--corpora-dir", str(tmp_path / "corpora"), "--run-tag", "forked", "--sample-tokens", "0"]
    assert train.main(["--resume", str(made), "--fork", *words]) == 0
    (forked,) = (tmp_path / "runs").glob("*_forked")
    after = read_checkpoint(forked / CHECKPOINTS / "step_000006")
    assert after.optimizer_tensors["token_embedding.weight/step"] == 6  # 4 of them in nanoGPT


def test_commands_for_runs_accept_a_converted_one(run: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    trained_nanogpt(tmp_path / "ckpt.pt")
    made, _ = run(tmp_path / "ckpt.pt", "--tokenizer", "char", "--dataset", "letters.txt")
    folder = ["--runs-dir", str(made.parent)]
    for words in (["list"], ["show", made.name], ["check", made.name], ["explain", made.name, "n_embd"]):
        assert experiments.main([*words, *folder]) == 0, words
    printed = capsys.readouterr()
    assert printed.err == ""
    assert "interrupted" in printed.out
    assert "no logs/" not in printed.out
    assert weights.main(["inspect", made.name, *folder]) == 0
    assert weights.main(["diff", made.name, f"{made.name}:latest", *folder]) == 0
    assert "equal: " in capsys.readouterr().out


def test_padding_of_the_vocabulary_is_left_out(run: Any, tmp_path: Path) -> None:
    p = foreign.gpt2(vocab_size=V + 5)
    torch.save(foreign.nanogpt_checkpoint(p, None, 3), tmp_path / "ckpt.pt")
    made, out = run(tmp_path / "ckpt.pt", "--tokenizer", "char", "--dataset", "letters.txt")
    torch.testing.assert_close(logits(made), foreign.gpt2_logits(p, IDX)[..., :V], rtol=0, atol=1e-5)
    assert "5 of 16 rows of the vocabulary were left out" in out


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        ({"model_args": {"n_layer": 2}}, "model_args: n_head: expected a whole number"),
        ({"model_args": None}, "model_args and config: expected settings by name"),
        ({"model": {"a": 1}}, "model: expected tensors by name"),
        ({"model": {"transformer.wte.weight": torch.zeros(3, 3)}}, "transformer.wte.weight: expected shape"),
        ({"config": {"learning_rate": [1]}}, "learning_rate: expected a number"),
        ({"config": {"learning_rate": -1.0}}, "learning_rate"),
    ],
)
def test_a_damaged_nanogpt_checkpoint_is_refused_by_name(
    run: Any, tmp_path: Path, change: dict[str, Any], problem: str
) -> None:
    checkpoint = foreign.nanogpt_checkpoint(foreign.gpt2(), None, 3)
    torch.save({**checkpoint, **change}, tmp_path / "ckpt.pt")
    assert problem in run(tmp_path / "ckpt.pt", "--tokenizer", "char", "--dataset", "letters.txt", status=2)


def test_unknown_untied_and_missing_tensors_are_refused(run: Any, tmp_path: Path) -> None:
    words = ("--tokenizer", "char", "--dataset", "letters.txt")
    p = foreign.gpt2()
    checkpoint = foreign.nanogpt_checkpoint(p, None, 3)
    checkpoint["model"]["transformer.h.0.attn.gate.weight"] = torch.zeros(3)
    torch.save(checkpoint, tmp_path / "ckpt.pt")
    assert "transformer.h.0.attn.gate.weight is not a tensor of nanoGPT" in run(tmp_path / "ckpt.pt", *words, status=2)
    checkpoint = foreign.nanogpt_checkpoint(p, None, 3)
    checkpoint["model"]["lm_head.weight"] = torch.zeros(V, C)
    torch.save(checkpoint, tmp_path / "ckpt.pt")
    assert "nanoGPT ties the two" in run(tmp_path / "ckpt.pt", *words, status=2)
    checkpoint = foreign.nanogpt_checkpoint(p, None, 3)
    del checkpoint["model"]["transformer.h.1.mlp.c_fc.weight"]
    torch.save(checkpoint, tmp_path / "ckpt.pt")
    assert "blocks.1.mlp.up.weight is missing" in run(tmp_path / "ckpt.pt", *words, status=2)


# --------------------------------------------------------------------------------------------------- llm.c, llama2.c

CHARACTERS = {"type": "char", "version": 1, "vocabulary": list("\n abcdefghi"), "unknown_token": None}


@pytest.fixture
def characters(tmp_path: Path) -> tuple[str, str]:
    (tmp_path / "characters.json").write_text(json.dumps(CHARACTERS))
    return "--tokenizer", str(tmp_path / "characters.json")


@pytest.mark.parametrize("version", [3, 5])
def test_a_file_of_llm_c_computes_the_same(run: Any, tmp_path: Path, characters: tuple[str, str], version: int) -> None:
    p = foreign.gpt2()
    if version == 5:
        p = {name: tensor.bfloat16().float() for name, tensor in p.items()}
    foreign.write_llm_c(tmp_path / "gpt2.bin", p, version)
    made, _ = run(tmp_path / "gpt2.bin", *characters)
    torch.testing.assert_close(logits(made), foreign.gpt2_logits(p, IDX, "tanh"), rtol=0, atol=1e-5)


def test_the_state_of_llm_c_gives_moments_and_the_weights_in_float32(
    run: Any, tmp_path: Path, characters: tuple[str, str]
) -> None:
    p = foreign.gpt2()
    m, v = ({name: tensor * factor for name, tensor in p.items()} for factor in (0.1, 0.01))
    foreign.write_llm_c(tmp_path / "model_00000300.bin", p, 5)
    foreign.write_llm_c_state(tmp_path / "state_00000300_00000.bin", 300, m, v, p)
    made, out = run(tmp_path, *characters)
    assert "step 300" in out
    found = read_checkpoint(made / CHECKPOINTS / "step_000300")
    assert torch.equal(found.weights["blocks.1.mlp.up.weight"], p["transformer.h.1.mlp.c_fc.weight"])
    tensors = found.optimizer_tensors
    assert torch.equal(tensors["blocks.1.mlp.up.weight/exp_avg"], m["transformer.h.1.mlp.c_fc.weight"])
    assert torch.equal(tensors["token_embedding.weight/exp_avg_sq"], v["transformer.wte.weight"])
    assert tensors["final_norm.bias/step"] == 300
    foreign.write_llm_c_state(tmp_path / "state_00000300_00000.bin", 300, m, v, processes=2)
    made.rename(tmp_path / "first")
    _, out = run(tmp_path, *characters)
    assert "that of 2 processes, so it was left out" in out


@pytest.mark.parametrize("version", [0, 1])
@pytest.mark.parametrize("tied", [True, False])
def test_a_file_of_llama2_c_computes_the_same_with_its_tokenizer(
    run: Any, tmp_path: Path, version: int, tied: bool
) -> None:
    p = foreign.llama(tied)
    foreign.write_llama2_c(tmp_path / "model.bin", p, version)
    foreign.write_llama2_c_tokenizer(tmp_path / "tokenizer.bin")
    made, _ = run(tmp_path / "model.bin")
    torch.testing.assert_close(logits(made), foreign.llama_logits(p, IDX), rtol=0, atol=1e-5)
    tokenizer = load_export(made / EXPORT, torch.device("cpu")).tokenizer
    assert list(tokenizer.encode("ab a\nc")) == [10, 9, 3, 7]  # " ab", " a", "\n" as a byte, "c"
    assert tokenizer.decode([10, 9, 3, 7]).strip() == "ab a\nc"


def c_file(**changes: int) -> bytes:
    """A header of llm.c without tensors."""
    keys = ("magic", "version", "block_size", "vocab_size", "n_layer", "n_head", "n_embd", "padded")
    numbers = dict(zip(keys, (20240326, 3, T, V, L, 4, C, V), strict=True)) | changes
    return struct.pack("<256i", *numbers.values(), *[0] * 248)


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        (c_file(), "has 1,024 bytes, its header describes"),
        (c_file(version=4), "version 4 of llm.c's files"),
        (c_file(n_layer=2**31 - 1), "n_layer 2,147,483,647: expected 1 to"),
        (c_file(n_layer=-1), "n_layer -1: expected 1 to"),
        (c_file(n_head=5), "each must divide the one before"),
        (c_file(padded=3), "vocab_size 11, padded 3"),
        (c_file(magic=20240803), "a Llama 3 of llm.c"),
        (struct.pack("<2i", 0x616B3432, 2) + bytes(300), "version 2 of llama2.c's files (8-bit)"),
        (struct.pack("<9i", 0x616B3432, 1, *[2**31 - 1] * 7) + bytes(300), "n_layer 2,147,483,647"),
        (struct.pack("<9i", 0x616B3432, 1, C, 48, 2, 0, 0, V, T) + bytes(300), "n_head 0"),
        (b"hello" * 100, "expected ckpt.pt of nanoGPT"),
        (b"", "expected ckpt.pt of nanoGPT"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_file_with_a_false_header_is_refused(run: Any, tmp_path: Path, content: bytes, problem: str) -> None:
    (tmp_path / "model.bin").write_bytes(content)
    assert problem in run(tmp_path / "model.bin", "--tokenizer", "byte", status=2)


def test_a_damaged_tokenizer_of_llama2_c_is_refused(run: Any, tmp_path: Path) -> None:
    foreign.write_llama2_c(tmp_path / "model.bin", foreign.llama(), 1)
    (tmp_path / "tokenizer.bin").write_bytes(struct.pack("<IfI", 4, 0.0, 2**32 - 1))
    assert "ends in piece 0 of the 11" in run(tmp_path / "model.bin", status=2)
    (tmp_path / "tokenizer.bin").unlink()
    assert "has no tokenizer that can be read" in run(tmp_path / "model.bin", status=2)


# ---------------------------------------------------------------------------------------------------------- MyPT


@pytest.mark.parametrize("tied", [False, True])
def test_a_folder_of_mypt_computes_the_same_with_its_tokenizer(run: Any, tmp_path: Path, tied: bool) -> None:
    p = foreign.mypt(tied)
    foreign.write_mypt(tmp_path / "old", p, tie_weights=tied, optimizer=not tied)
    made, out = run(tmp_path / "old")
    torch.testing.assert_close(logits(made), foreign.mypt_logits(p, IDX), rtol=0, atol=1e-5)
    found = settings(made)
    assert found["qkv_bias"] is False
    assert found["head_bias"] is True
    assert found["batch_size"] == 4
    assert found["learning_rate"] == 2e-4
    assert "MyPT, step 7" in out
    for name in ("device", "save_dtype", "use_loss_mask"):
        assert out.count(f"note: {name} = ") == 1
    tensors = read_checkpoint(made / CHECKPOINTS / "step_000007").optimizer_tensors
    assert (len(tensors) > 0) == (not tied)
    if not tied:
        state = torch.load(tmp_path / "old" / "optimizer.pt")["state"]
        assert torch.equal(tensors["blocks.0.attention.qkv.weight/exp_avg"], state[0]["exp_avg"])
        assert torch.equal(tensors["token_embedding.weight/exp_avg_sq"], state[2 + 4 * (L - 1) + 3]["exp_avg_sq"])
        assert (tensors["blocks.0.attention.proj.bias/exp_avg"] == 0).all()


@pytest.mark.parametrize(
    ("name", "content", "problem"),
    [
        ("config.json", "[" * 100_000, "nested too deeply"),
        ("config.json", " " * (2 << 20), "is larger than 1 MiB"),
        ("config.json", "{", "not JSON"),
        ("config.json", json.dumps({**MYPT_CONFIG, "vocab_size": 10**12}), "vocab_size: expected a whole number"),
        ("config.json", json.dumps({**MYPT_CONFIG, "n_embd": 10**9}), "n_embd"),
        ("config.json", json.dumps({**MYPT_CONFIG, "n_layer": 3}), "is missing"),
        ("config.json", json.dumps({**MYPT_CONFIG, "rope_scale": 4.0}), "rope_scale: expected 1"),
        ("tokenizer.json", json.dumps({"token_kind": "words"}), "token_kind: expected char or gpt2"),
        ("tokenizer.json", json.dumps({"token_kind": "char", "chars": ["ab"]}), "chars: expected a list of characters"),
        ("tokenizer.json", "[" * 100_000, "nested too deeply"),
    ],
)
def test_a_damaged_folder_of_mypt_is_refused(run: Any, tmp_path: Path, name: str, content: str, problem: str) -> None:
    foreign.write_mypt(tmp_path / "old", foreign.mypt(), optimizer=False)
    (tmp_path / "old" / name).write_text(content)
    assert problem in run(tmp_path / "old", status=2)


# ------------------------------------------------------------------------------------------------------- pickles


class Code:
    def __reduce__(self) -> tuple[Any, ...]:
        return (exec, ("open('was_run', 'w')",))


def pickles(folder: Path) -> Iterator[tuple[str, str]]:
    """Write malicious and damaged files; yields the name and the expected error of each."""
    good = foreign.nanogpt_checkpoint(foreign.gpt2(), None, 3)
    torch.save({**good, "config": Code()}, folder / "code.pt")
    yield "code.pt", "refused: this pickle asks to import"
    torch.save({**good, "config": {"path": Path("x")}}, folder / "object.pt")
    yield "object.pt", "refused: this pickle asks to import pathlib"
    torch.save(good, folder / "old.pt", _use_new_zipfile_serialization=False)
    yield "old.pt", "not an archive of torch"
    wide = {**good["model"], "transformer.wpe.weight": torch.zeros(1, 1).expand(1 << 30, 1 << 10)}
    torch.save({**good, "model": wide}, folder / "expanded.pt")
    yield "expanded.pt", "without its elements"
    torch.save(good, folder / "good.pt")
    with (
        zipfile.ZipFile(folder / "good.pt") as archive,
        zipfile.ZipFile(folder / "small.pt", "w", zipfile.ZIP_DEFLATED) as packed,
    ):
        for part in archive.infolist():
            packed.writestr(part.filename, archive.read(part) + bytes(1 << 16))
    yield "small.pt", "refused: "
    with zipfile.ZipFile(folder / "empty.pt", "w") as packed:
        packed.writestr("archive/nothing", b"")
    yield "empty.pt", "damaged"
    (folder / "cut.pt").write_bytes((folder / "good.pt").read_bytes()[:1000])
    yield "cut.pt", "damaged"
    torch.save([1], folder / "list.pt")
    yield "list.pt", "expected model and model_args"
    doubled: list[Any] = [1]
    for _ in range(60):
        doubled = [doubled, doubled]  # 2^60 values in a few bytes
    torch.save({**good, "config": {"a": doubled}}, folder / "doubled.pt")
    yield "doubled.pt", "refused: more than 1,048,576 values"
    archive_of(folder / "bytearray.pt", b"c__builtin__\nbytearray\n(J\xff\xff\xff\x7ftR.")  # 2 GiB
    yield "bytearray.pt", "refused: this pickle asks to import __builtin__.bytearray"
    encoded = b"c_codecs\nencode\n(c_codecs\nencode\n(X\x01\0\0\0aX\x05\0\0\0utf-8tRX\x03\0\0\0hextR."
    archive_of(folder / "encoded.pt", encoded)
    yield "encoded.pt", "refused: this pickle asks to import _codecs.encode"
    archive_of(folder / "case.pt", b"ctorch\nFloatTensor\n(J\xff\xff\xff\x7ftR.", "Data.PKL")
    yield "case.pt", "refused: this pickle asks to import torch.FloatTensor"
    archive_of(folder / "nothing.pt", b"")
    yield "nothing.pt", "damaged: pickle exhausted before seeing STOP"
    two_directories(folder / "two.pt", zip64=False)
    yield "two.pt", "refused: another program may find other parts in it than torch does"
    two_directories(folder / "two64.pt", zip64=True)
    yield "two64.pt", "two64.pt: "  # refused, or damaged for a newer Python


def archive_of(path: Path, structure: bytes, name: str = "data.pkl") -> None:
    """Write an archive that contains one pickle."""
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr(f"archive/{name}", b"\x80\x02" + structure)


def two_directories(path: Path, zip64: bool) -> None:
    """Write an archive whose end points to a directory with a compressed pickle, right after a harmless one."""
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("archive/data.pkl", b"\x80\x02" + b"]" * (1 << 20) + b".")
    bad = path.read_bytes()
    archive_of(path, b"N.")
    good = path.read_bytes()
    parts = [bad[:-22], good[:-22], bad[-22:]]
    if zip64:  # Python before 3.11.14 takes the record right before the locator, torch the one that it points to
        record = struct.Struct("<4sQHHIIQQQQ")
        length, start = struct.unpack("<II", bad[-10:-2])
        parts.insert(1, record.pack(b"PK\x06\x06", 44, 45, 45, 0, 0, 1, 1, length, start))
        start = sum(map(len, parts[:3])) - length
        parts.insert(3, record.pack(b"PK\x06\x06", 44, 45, 45, 0, 0, 1, 1, length, start))
        parts.insert(4, struct.pack("<4sIQI", b"PK\x06\x07", 0, len(bad) - 22, 1))
    path.write_bytes(b"".join(parts))


def test_malicious_and_damaged_pickles_are_refused_in_one_line_and_not_run(run: Any, tmp_path: Path) -> None:
    for name, problem in pickles(tmp_path):
        found = run(tmp_path / name, "--tokenizer", "char", "--dataset", "letters.txt", status=2)
        assert problem in found, name
    assert not (tmp_path / "was_run").exists()


def test_out_must_be_new(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert weights.main(["convert", str(tmp_path / "nothing.pt"), "--out", str(tmp_path)]) == 2
    assert "exists already" in capsys.readouterr().err
    assert weights.main(["convert", str(tmp_path / "nothing.pt"), "--out", str(tmp_path / "new")]) == 2
    assert "No such file" in capsys.readouterr().err
