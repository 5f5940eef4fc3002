"""Mistakes of a user: one clear line, exit status 2, no run directory."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

import experiments
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
        (["--lr", "3e-4"], "did you mean --learning-rate?"),
        (["--wd", "0"], "did you mean --weight-decay?"),
        (["--quiet"], "unknown flag --quiet"),
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
        (["--jobs", "2"], "--jobs is for the runs of --multirun"),
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


def test_a_flag_that_only_a_sweep_gives_is_no_suggestion(tiny_argv: Argv, capsys: pytest.CaptureFixture[str]) -> None:
    assert train.main(tiny_argv("--trail")) == 2
    assert one_error(capsys) == "error: unknown flag --trail"


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


# ------------------------------------------------------------------------------------- a mistake leaves nothing

LONG = "x" * 5000


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["--device", "cuda:7"], "cuda:7"),
        (["--callbacks", "no_such:Thing"], "no_such:Thing cannot be used"),
        (["--fp8"], "fp8 needs a CUDA device"),
        (["--sample-prompt", "€"], "character '€'"),
        (["--max-iters", "none", "--epochs", "0.01", "--warmup-iters", "900"], "warmup"),
        (["--n-embd", "65536", "--n-layer", "16", "--n-head", "1"], "parameters, which do not fit into the"),
        (["--ffn-dim", str(10**15)], "parameters, which do not fit into the"),
        (["--ffn-dim", str(10**18)], "more parameters than can be counted, which do not fit"),
        (["--init-from", LONG], "File name too long"),
        (["--resume", LONG], "File name too long"),
        (["--dataset", LONG], "unknown dataset xxx"),
        (["--dataset", "a\nb"], r"unknown dataset a\nb"),
        (["--runs-dir", LONG], "File name too long"),
        (["--runs-dir", "/dev/null"], "runs_dir: '/dev/null': Not a directory"),
        (["--runs-dir", "/dev/null/x"], "Not a directory"),
        (["--corpora-dir", LONG], "File name too long"),
        (["--aim-logging", "--aim-repo", LONG], "File name too long"),
        (["--config", LONG + ".yaml"], "File name too long"),
        (["--config", "a\nb.yaml"], r"a\nb.yaml: no such configuration file"),
        (["--config-dir", LONG], "File name too long"),
        (["--run-tag", "a\nb"], "a tag is 1 to 64 letters"),
    ],
)
def test_a_mistake_is_one_line_and_leaves_nothing(
    words: list[str],
    expected: str,
    tiny_argv: Argv,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr("utils.training.setup.available_memory", lambda device: 8 << 30)
    before = sorted(tmp_path.rglob("*"))
    assert train.main(tiny_argv(*words)) == 2
    message = one_error(capsys)
    assert expected in message
    assert len(message) < 3500
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize("key", ["dataset", "runs_dir", "corpora_dir", "aim_repo"])
def test_a_nul_in_a_path_is_one_line(
    key: str, tiny_argv: Argv, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "x.yaml").write_text(f'{key}: "a\\0b"\naim_logging: true\n')
    flags = [word for word in tiny_argv() if word != "--no-aim-logging"]
    position = flags.index(f"--{key.replace('_', '-')}")
    assert train.main([*flags[:position], *flags[position + 2 :], "--config", str(tmp_path / "x.yaml")]) == 2
    assert "a\\x00b" in one_error(capsys)
    assert not (tmp_path / "corpora").exists()


@pytest.mark.parametrize(
    ("main", "words"),
    [
        (experiments.main, ["show", LONG]),
        (experiments.main, ["list", "--runs-dir", LONG]),
        (experiments.main, ["plot", "x", "--out", f"{LONG}.png", "--runs-dir", LONG]),
        (experiments.main, ["explain", LONG]),
        (experiments.main, ["show", "a\nb", "--runs-dir", "c\nd"]),
        (inference.main, [LONG]),
        (inference.main, ["--prompt-file", LONG, "x"]),
        (profile_model.main, ["--compare", LONG, LONG]),
        (profile_model.main, ["--out", LONG, "--n-layer", "1"]),
    ],
)
def test_a_name_that_no_file_can_have_is_one_line(
    main: Callable[[list[str]], int], words: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    assert main(words) in ([0, 2] if words[0] == "list" else [2])
    if words[0] != "list":
        one_error(capsys)
