"""Mistakes of a user: one clear line, exit status 2, no run directory."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

import inference
import profile_model
import train

Argv = Callable[..., list[str]]


def one_error(capsys: pytest.CaptureFixture[str]) -> str:
    """The one line on stderr."""
    captured = capsys.readouterr()
    lines = captured.err.splitlines()
    assert len(lines) == 1, captured.err
    assert lines[0].startswith("error: ")
    return lines[0]


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["--batch-sise", "3"], "did you mean --batch-size?"),
        (["--batch-size", "many"], "expected integer >= 1"),
        (["--dropout", "1"], "expected number >= 0 and < 1"),
        (["--learning-rate", "nan"], "expected number > 0"),
        (["--n-embd", "17"], "must be divisible by n_head"),
        (["--config", "nowhere.yaml"], "no such configuration file"),
        (["--run-tag", "a/b"], "letters, digits"),
        (["--run-tag", "latest"], "reserved"),
        (["--run-tag", "x" * 65], "1 to 64"),
        (["--device", "cuda:7"], "available: cpu"),
        (["--device", "tpu"], "expected auto, cpu, cuda"),
        (["--dataset", "shakespear"], "did you mean shakespeare?"),
        (["--block-size", "2000"], "block_size 2000 needs at least 2,001"),
        (["--sample-prompt", "€"], "character '€'"),
        (["--qa-template", "Q:"], "--qa-template: expected text that contains {question}, got 'Q:'"),
        (["--logit-softcap", "0"], "--logit-softcap: expected number > 0"),
        (["--ngram-rows", "512,few"], "--ngram-rows: expected list of integers >= 1"),
        (["--warmup-iters", "7"], "must not exceed max_iters (6)"),
        (["surplus"], "unknown argument surplus"),
        (["--note", "caf\udce9"], "--note: expected text"),  # what a shell makes of bytes that are no UTF-8
        (["--dataset", "~nobodyx/foo"], "unknown dataset ~nobodyx/foo"),
    ],
)
def test_a_mistake_on_the_command_line(
    words: list[str], expected: str, tiny_argv: Argv, runs_dir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert train.main(tiny_argv(*words)) == 2
    assert expected in one_error(capsys)
    assert not runs_dir.exists()


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("batch_sise: 3", "x.yaml:1: unknown key batch_sise; did you mean batch_size?"),
        ("# first\nn_kv_head: many", "x.yaml:2: n_kv_head: expected integer >= 1 or none, got 'many'"),
        ("dropout: .nan", "x.yaml:1: dropout: expected number"),
        ("a: [", "x.yaml:1: not valid YAML"),
        ("- 1\n- 2", "expected a mapping of settings, got a list"),
        ("x: !!python/object/apply:os.system [ls]", "refused the YAML tag"),
    ],
)
def test_a_mistake_in_a_file(
    text: str, expected: str, tiny_argv: Argv, runs_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "x.yaml").write_text(text)
    assert train.main(tiny_argv("--config", str(tmp_path / "x.yaml"))) == 2
    assert expected in one_error(capsys)
    assert not runs_dir.exists()


@pytest.mark.parametrize(
    ("content", "expected"),
    [(b"", "the corpus is empty"), (b"ab\0cd", "binary file"), (b"line\n\xff\xfe", ":2: not UTF-8")],
)
def test_a_corpus_that_is_no_text(
    content: bytes, expected: str, tiny_argv: Argv, runs_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "bad.txt").write_bytes(content)
    assert train.main(tiny_argv("--dataset", str(tmp_path / "bad.txt"))) == 2
    assert expected in one_error(capsys)
    assert not runs_dir.exists()


@pytest.fixture
def trained(tiny_argv: Argv, runs_dir: Path, capsys: pytest.CaptureFixture[str]) -> Path:
    """A tiny completed run with tag `one`."""
    assert train.main(tiny_argv("--run-tag", "one")) == 0
    capsys.readouterr()
    (run,) = runs_dir.iterdir()
    return run


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["two"], "no run two in"),
        (["one", "--temperature", "-1"], "--temperature: expected number >= 0"),
        (["one", "--temperature", "warm"], "--temperature: expected number"),
        (["one", "--top-k", "0"], "--top-k: expected integer >= 1"),
        (["one", "--top-p", "1.5"], "--top-p: expected number > 0 and <= 1"),
        (["one", "--max-new-tokens", "0"], "--max-new-tokens: expected integer >= 1"),
        (["one", "--prompt", "€"], "character '€'"),
        (["one", "--device", "cuda"], "not available here"),
        (["one", "--prompd", "x"], "did you mean --prompt?"),
    ],
)
def test_a_mistake_in_inference(
    words: list[str], expected: str, trained: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert inference.main([*words, "--runs-dir", str(trained.parent)]) == 2
    assert expected in one_error(capsys)


def test_an_ambiguous_run_is_not_guessed(trained: Path, tiny_argv: Argv, capsys: pytest.CaptureFixture[str]) -> None:
    assert train.main(tiny_argv("--run-tag", "other")) == 0
    capsys.readouterr()
    assert inference.main(["20", "--runs-dir", str(trained.parent)]) == 2
    assert "ambiguous" in one_error(capsys)


@pytest.mark.parametrize("name", ["model.safetensors", "config.json", "tokenizer.json"])
def test_a_damaged_export_is_named(name: str, trained: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = trained / "artifacts" / "export" / name
    path.write_bytes(path.read_bytes()[:-20])
    assert inference.main(["one", "--runs-dir", str(trained.parent)]) == 2
    assert name in one_error(capsys)
    path.unlink()
    assert inference.main(["one", "--runs-dir", str(trained.parent)]) == 2
    assert f"{name} missing" in one_error(capsys)


def test_generation_streams_the_prompt_and_its_continuation(trained: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for prompt in ("line 1", "", "line 1: the quick brown fox jumps"):
        assert (
            inference.main(["one", "--prompt", prompt, "--max-new-tokens", "5", "--runs-dir", str(trained.parent)]) == 0
        )
        text = capsys.readouterr().out
        assert text.startswith(prompt)
        assert len(text) == len(prompt) + 5 + 1


@pytest.mark.parametrize(("words", "expected"), [(["--steps", "0"], "at least 1"), (["--stepps", "1"], "--steps?")])
def test_a_mistake_in_profiling(
    words: list[str], expected: str, tiny_argv: Argv, capsys: pytest.CaptureFixture[str]
) -> None:
    assert profile_model.main(tiny_argv(*words)) == 2
    assert expected in one_error(capsys)
