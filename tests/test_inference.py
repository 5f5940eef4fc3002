"""Each mode of inference.py, and its mistakes, each reported in one line."""

from __future__ import annotations

import argparse
import builtins
import io
import json
import math
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from conftest import one_error

import inference
from tests.tiny_export import BLOCK_SIZE, TOKENIZER, char_tokenizer, save_tiny_run
from utils.config.settings import InferenceConfig
from utils.inference.generator import Generator, Request
from utils.inference.interactive import OFF, OPTIONS
from utils.inference.sampling import SamplingOptions

Main = Callable[..., int]
QA = ("--mode", "qa", "--qa-template", "Q: {question}?\nA: ", "--qa-stop", "s")


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with one run."""
    folder = tmp_path_factory.mktemp("runs")
    save_tiny_run(folder, "tiny")
    return folder


@pytest.fixture
def run_inference(runs: Path) -> Main:
    """Runs inference.py on that run, with 20 tokens by default."""
    return lambda *words: inference.main(["tiny", "--runs-dir", str(runs), "--max-new-tokens", "20", *map(str, words)])


@pytest.fixture
def generator(runs: Path) -> Generator:
    return Generator.from_run("tiny", runs)


# ------------------------------------------------------------------------------ one prompt


def test_the_prompt_and_its_continuation_are_printed(
    run_inference: Main, generator: Generator, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run_inference("--prompt", "ab") == 0
    assert capsys.readouterr().out == "ab" + generator.generate("ab", Request(20)).text + "\n"


def test_every_sampling_option_is_used(
    run_inference: Main, generator: Generator, capsys: pytest.CaptureFixture[str]
) -> None:
    words = "--temperature 1.5 --top-k 9 --top-p 0.9 --min-p 0.01 --repetition-penalty 1.3 --seed 4 --window exact"
    banned = TOKENIZER.encode("\nst")
    options = SamplingOptions(1.5, 9, 0.9, 0.01, 1.3, tuple(sorted(banned)))
    request = Request(40, options, ["ab", "\n\n"], 4, "exact")
    limits = ["--max-new-tokens", "40", "--ban", "\\ns", "--ban", "t", "--stop", "ab", "--stop", "\\n\\n"]
    assert run_inference("--prompt", "ab", *words.split(), *limits) == 0
    assert capsys.readouterr().out == "ab" + generator.generate("ab", request).text + "\n"


def test_the_text_ends_before_a_stop_string_with_a_line_break(
    run_inference: Main, generator: Generator, capsys: pytest.CaptureFixture[str]
) -> None:
    letters = "abcdefghijklmnopqrstuvwxyz ü"  # without them line breaks are likely
    options = SamplingOptions(banned=tuple(TOKENIZER.encode(letters)))
    whole = generator.generate("ab", Request(20, options)).text
    assert "\n" in whole
    assert run_inference("--prompt", "ab", "--stop", "\\n", "--ban", letters) == 0
    assert capsys.readouterr().out == "ab" + whole.partition("\n")[0] + "\n"


def test_defaults_come_from_the_configuration(
    run_inference: Main, generator: Generator, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    (tmp_path / "a.yaml").write_text("inference:\n  temperature: 1.5\n  top_k: 9\n")
    assert run_inference("--prompt", "ab", "--config", tmp_path / "a.yaml", "--top-k", "none") == 0
    options = SamplingOptions(temperature=1.5)
    assert capsys.readouterr().out == "ab" + generator.generate("ab", Request(20, options)).text + "\n"


def test_samples_draw_from_the_next_seeds(
    run_inference: Main, generator: Generator, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run_inference("--prompt", "ab", "--samples", 3, "--seed", 5, "--batch-size", 2) == 0
    texts = [generator.generate("ab", Request(20, seed=seed)).text for seed in (5, 6, 7)]
    expected = "".join(f"sample {i} of 3, seed {4 + i}\nab{text}\n" for i, text in enumerate(texts, start=1))
    assert capsys.readouterr().out == expected


def test_samples_as_lines_of_json(
    run_inference: Main, generator: Generator, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run_inference("--prompt", "ab", "--samples", 2, "--seed", 5, "--json") == 0
    found = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    texts = [generator.generate("ab", Request(20, seed=seed)).text for seed in (5, 6)]
    assert [(line["prompt"], line["completion"], line["seed"]) for line in found] == [
        ("ab", text, seed) for text, seed in zip(texts, (5, 6), strict=True)
    ]


@pytest.mark.parametrize("words", [["--weights", "bfloat16"], ["--quantize", "int8"], ["--weights", "float32"]])
def test_weights_can_be_smaller(words: list[str], run_inference: Main, capsys: pytest.CaptureFixture[str]) -> None:
    assert run_inference("--prompt", "ab", *words) == 0
    assert len(capsys.readouterr().out) == len("ab") + 20 + 1


@pytest.mark.parametrize("draft", ["ngram", "itself"])
def test_a_draft_changes_the_speed_and_not_the_text(
    draft: str, run_inference: Main, generator: Generator, capsys: pytest.CaptureFixture[str]
) -> None:
    name = "ngram" if draft == "ngram" else generator.name
    words = ["--temperature", "0", "--draft", name, "--draft-tokens", "3", "--stats", "--samples", "2"]
    assert run_inference("--prompt", "ababab", *words) == 0
    captured = capsys.readouterr()
    text = generator.generate("ababab", Request(20, SamplingOptions(temperature=0))).text
    assert captured.out.count(f"ababab{text}\n") == 2
    assert " proposed tokens accepted, " in captured.err


def test_a_prompt_longer_than_the_context_gives_a_note(run_inference: Main, capsys: pytest.CaptureFixture[str]) -> None:
    assert run_inference("--prompt", "a" * (BLOCK_SIZE + 1)) == 0
    assert capsys.readouterr().err == "note: the model sees only the last 16 of the prompt's 17 tokens\n"


class Ascii:
    """A stdout that can encode ASCII only."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.bytes = io.BytesIO()
        monkeypatch.setattr("sys.stdout", io.TextIOWrapper(self.bytes, encoding="ascii"))


def test_characters_that_a_terminal_lacks_are_shown_as_escapes(
    run_inference: Main, monkeypatch: pytest.MonkeyPatch
) -> None:
    stdout = Ascii(monkeypatch)
    assert run_inference("--prompt", "fü") == 0
    assert stdout.bytes.getvalue().startswith(b"f\\xfc")


def test_json_is_utf_8_on_any_stdout(run_inference: Main, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "prompts.txt").write_text("fü", encoding="utf-8")
    stdout = Ascii(monkeypatch)
    assert run_inference("--prompt-file", tmp_path / "prompts.txt") == 0
    assert json.loads(stdout.bytes.getvalue())["prompt"] == "fü"


def test_speeds_are_reported_after_the_text(
    run_inference: Main, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("utils.inference.stats.read_limit", lambda _: 1e10)
    assert run_inference("--prompt", "abc", "--stats") == 0
    lines = capsys.readouterr().err.splitlines()
    assert [line.split()[0] for line in lines] == ["prompt", "prefill", "decode", "memory"]
    assert lines[0] == "prompt   3 tokens"
    assert lines[2].endswith("19 tokens")
    assert lines[3].endswith("of the 10.0 GB/s that this machine reads")


def test_an_answer_is_printed_without_its_question(
    run_inference: Main, capsys: pytest.CaptureFixture[str], runs: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = InferenceConfig(qa_template="Q: {question}?\nA: ", qa_stop="s")
    generator = Generator.from_export(runs / "tiny" / "artifacts" / "export", settings=settings)
    answer = generator.generate_qa("why", Request(20))
    assert answer.finish == "stop"
    assert run_inference("--prompt", "why", *QA) == 0
    assert capsys.readouterr().out == answer.text + "\n"


class ClosedPipe:
    """A stdout whose reader has gone."""

    def __enter__(self) -> io.TextIOWrapper:
        reader, writer = os.pipe()
        os.close(reader)
        self.file = os.fdopen(writer, "w")
        return self.file

    def __exit__(self, *_: object) -> None:
        self.file.close()


PIPED = ("", "--samples 2", "--interactive", "--prompt-file prompts.txt", "--stats", "two", "two --logprobs")


@pytest.mark.parametrize("words", [*PIPED, "--score prompts.txt", "--show-info"])
def test_a_closed_pipe_ends_quietly(
    words: str,
    two_runs: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("prompts.txt").write_text("ab\ncd\n")
    monkeypatch.setattr("sys.stdin", io.StringIO("ab\n"))
    with ClosedPipe() as stdout:
        monkeypatch.setattr("sys.stdout", stdout)
        assert inference.main(["one", *words.split(), "--runs-dir", str(two_runs)]) in (
            0,
            141,
        )  # 0: a table is built without noticing
        monkeypatch.undo()
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("words", ["", "two", "--show-info"])
def test_a_full_disk_behind_stdout_is_reported_in_one_line(
    words: str, two_runs: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    with Path("/dev/full").open("w") as stdout:
        monkeypatch.setattr("sys.stdout", stdout)
        assert inference.main(["one", *words.split(), "--runs-dir", str(two_runs)]) == 1
        monkeypatch.undo()
    assert one_error(capsys) == "error: output: cannot be written: No space left on device\n"


def test_without_a_stdout_nothing_fails(run_inference: Main, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.stdout", None)
    assert run_inference("--prompt", "ab") == 0


def test_a_prompt_may_look_like_a_flag(run_inference: Main, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    save_tiny_run(tmp_path, "dashed", char_tokenizer("ab -_"))
    words = ["dashed", "--runs-dir", str(tmp_path), "--max_new_tokens", "5"]
    assert inference.main([*words, "--prompt", "-- a_b"]) == 0
    assert capsys.readouterr().out.startswith("-- a_b")
    assert inference.main([*words, "--prompt=-ab"]) == 0
    assert capsys.readouterr().out.startswith("-ab")


def test_a_terminal_gets_no_control_characters(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    save_tiny_run(tmp_path, "wild", char_tokenizer("a\x1b"))
    monkeypatch.setattr("sys.stdout.isatty", lambda: True, raising=False)
    assert inference.main(["wild", "--runs-dir", str(tmp_path), "--prompt", "aaa"]) == 0
    out = capsys.readouterr().out
    assert "\\x1b" in out
    assert "\x1b" not in out


# ------------------------------------------------------------------------------ files of prompts


def read_lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def test_each_line_of_a_text_file_is_a_prompt(
    run_inference: Main, generator: Generator, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "prompts.txt").write_bytes("\ufeffab\r\n\nfür\n c".encode())
    out = tmp_path / "out.jsonl"
    assert run_inference("--prompt-file", tmp_path / "prompts.txt", "--out", out, "--seed", 3) == 0
    completions = generator.generate_batch(["ab", "für", " c"], Request(20, seed=3))
    assert read_lines(out) == [
        {
            "prompt": completion.prompt,
            "completion": completion.text,
            "tokens": 20,
            "logprob": pytest.approx(sum(completion.logprobs), abs=1e-4),
            "finish": "length",
            "seed": 3 + i,
        }
        for i, completion in enumerate(completions)
    ]
    assert "für" in out.read_text(encoding="utf-8")
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err == f"wrote 3 completions to {out}\n"


def test_jsonl_keeps_the_other_keys_of_a_prompt(run_inference: Main, tmp_path: Path) -> None:
    (tmp_path / "prompts.jsonl").write_text(
        '{"id": 7, "prompt": "ab", "more": [null, {"x": "\\ud83d"}]}\n\n{"prompt": "", "completion": "old"}\n'
    )
    out = tmp_path / "out.jsonl"
    assert run_inference("--prompt-file", tmp_path / "prompts.jsonl", "--out", out) == 0
    first, second = read_lines(out)
    assert list(first) == ["id", "prompt", "more", "completion", "tokens", "logprob", "finish", "seed"]
    assert (first["id"], first["more"]) == (7, [None, {"x": "\ud83d"}])
    assert len(second["completion"]) == 20


def test_without_out_the_lines_go_to_stdout(
    run_inference: Main, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "prompts.txt").write_text("ab\ncd\n")
    assert run_inference("--prompt-file", tmp_path / "prompts.txt", "--samples", 2) == 0
    captured = capsys.readouterr()
    lines = [json.loads(line) for line in captured.out.splitlines()]
    assert [(line["prompt"], line["seed"]) for line in lines] == [
        ("ab", 1337),
        ("ab", 1338),
        ("cd", 1339),
        ("cd", 1340),
    ]
    assert captured.err == ""


def test_questions_in_a_file_are_answered(run_inference: Main, tmp_path: Path) -> None:
    (tmp_path / "prompts.txt").write_text("why\n")
    assert run_inference("--prompt-file", tmp_path / "prompts.txt", *QA, "--out", tmp_path / "out") == 0
    (line,) = read_lines(tmp_path / "out")
    assert (line["prompt"], line["finish"]) == ("why", "stop")
    assert "s" not in line["completion"]


def test_a_batch_reports_how_many_prompts_exceed_the_context(
    run_inference: Main, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "prompts.txt").write_text("ab\n" + "a" * 17 + "\n" + "b" * 40)
    assert run_inference("--prompt-file", tmp_path / "prompts.txt") == 0
    assert capsys.readouterr().err == "note: the model sees only the last 16 tokens of 2 prompts\n"


@pytest.mark.parametrize(
    ("name", "content", "expected"),
    [
        ("p.txt", b"ab\n\xff\n", "p.txt:2: not UTF-8 text (byte 1 of the line is 0xff)"),
        ("p.jsonl", b'{"prompt": "a"}\n{"prompt": "a\xc3"}', "p.jsonl:2: not UTF-8 text (byte 14"),
        ("p.jsonl", b'\n{"prompt": "a"', "p.jsonl:2: not JSON (Expecting ',' delimiter at column 15), expected"),
        ("p.jsonl", b"[" * 100_000, "p.jsonl:1: not JSON"),
        ("p.jsonl", b'{"text": "a"}', 'p.jsonl:1: expected an object with a text "prompt", got {"text": "a"}'),
        ("p.JSONL", b'{"prompt": "a", "x": NaN}', "p.JSONL:1: not JSON (NaN is not a number)"),
        ("p.jsonl", b'{"prompt": 3}', "p.jsonl:1: expected an object"),
        ("p.jsonl", b'"a"', "p.jsonl:1: expected an object"),
        ("p.txt", "ab\n\na€".encode(), "p.txt:3: character '€' (U+20AC) at position 1"),
        ("p.txt", b"", "p.txt: no prompts found"),
        ("p.txt", b"\n\r\n", "p.txt: no prompts found"),
    ],
)
def test_a_mistake_in_a_file_of_prompts_is_reported_in_one_line(
    name: str, content: bytes, expected: str, run_inference: Main, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / name).write_bytes(content)
    assert run_inference("--prompt-file", tmp_path / name, "--out", tmp_path / "out") == 2
    assert expected in one_error(capsys)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("out", ["missing/out.jsonl", "folder"])
def test_a_file_that_cannot_be_written_is_reported_before_any_work(
    out: str,
    run_inference: Main,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(inference, "load", lambda *_: pytest.fail("the model was loaded"))
    (tmp_path / "folder").mkdir()
    (tmp_path / "p.txt").write_text("ab")
    assert run_inference("--prompt-file", tmp_path / "p.txt", "--out", tmp_path / out) == 2
    assert "cannot be written: " in one_error(capsys)


def test_prompts_are_not_overwritten(run_inference: Main, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    prompts = tmp_path / "p.txt"
    prompts.write_text("ab")
    (tmp_path / "link").symlink_to(prompts)
    assert run_inference("--prompt-file", prompts, "--out", tmp_path / "link") == 2
    assert "link: cannot be written: the prompts are read from it" in one_error(capsys)
    assert prompts.read_text() == "ab"


def test_a_write_that_fails_leaves_the_old_file(
    run_inference: Main, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.replace", full)
    (tmp_path / "p.txt").write_text("ab")
    (tmp_path / "out").write_text("old")
    assert run_inference("--prompt-file", tmp_path / "p.txt", "--out", tmp_path / "out") == 2
    assert one_error(capsys).endswith("out: cannot be written: No space left on device\n")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "p.txt"]
    assert (tmp_path / "out").read_text() == "old"


# ------------------------------------------------------------------------------ the interactive mode


@pytest.fixture
def converse(
    run_inference: Main, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Callable[..., tuple[str, str]]:
    """Types lines into the interactive mode, and returns its stdout and stderr; raises exceptions among the lines."""

    def run(*lines: str | type[BaseException], words: tuple[str, ...] = ()) -> tuple[str, str]:
        typed: Iterator[str | type[BaseException]] = iter(lines)

        def typed_line(_: str = "") -> str:
            line = next(typed, EOFError)
            if isinstance(line, str):
                return line
            raise line

        monkeypatch.setattr(builtins, "input", typed_line)
        assert run_inference("--interactive", *words) == 0
        captured = capsys.readouterr()
        return captured.out, captured.err

    return run


Converse = Callable[..., tuple[str, str]]


def test_typed_lines_continue_one_text(converse: Converse, generator: Generator) -> None:
    first = generator.generate("ab", Request(20)).text
    second = generator.generate(f"ab{first}\ncd", Request(20, seed=1338)).text
    third = generator.generate(f"ab{first}\ncd{second}", Request(20, seed=1339)).text  # the empty line
    out, err = converse("ab", "cd", "", "/reset", "ab")
    assert out == f"{first}\n{second}\n{third}\n{first}\n"
    assert err == "note: the model sees only the last 16 of the text's 25 tokens\n"


def test_settings_change_between_the_turns(converse: Converse, generator: Generator) -> None:
    values = {
        "/temperature": "1.5",
        "/top-k": "9",
        "/top-p": "0.9",
        "/min-p": "0.01",
        "/repetition-penalty": "1.3",
        "/ban": "st",
        "/stop": "\\n\\n",
        "/max-new-tokens": "30",
        "/seed": "4",
        "/window": "exact",
    }
    assert values.keys() == OPTIONS.keys()
    options = SamplingOptions(1.5, 9, 0.9, 0.01, 1.3, tuple(TOKENIZER.encode("st")))
    text = generator.generate("ab", Request(30, options, ["\n\n"], 4, "exact")).text
    out, err = converse(*(f"{name} {value}" for name, value in values.items()), "ab")
    *printed, _ = out.removesuffix(f"{text}\n").split("\n")
    assert printed == [
        "temperature 1.5",
        "top-k 9",
        "top-p 0.9",
        "min-p 0.01",
        "repetition-penalty 1.3",
        "ban 'st'",
        "stop '\\n\\n'",
        "max-new-tokens 30",
        "seed 4",
        "window exact",
    ]
    assert err == ""


def test_settings_can_be_switched_off_and_shown(converse: Converse) -> None:
    words = ("--top-k", "3", "--stop", "a", "--ban", "b")
    out, _ = converse("/top-k", "/top-k none", "/stop b", "/stop none", "/ban \\n", words=words)
    assert out == f"top-k 3\ntop-k {OFF}\nstop 'a', 'b'\nstop {OFF}\nban '\\nb'\n"


def test_showing_the_seed_changes_nothing(converse: Converse) -> None:
    asked, _ = converse("ab", "/seed", "cd")
    assert asked.replace("seed 1337\n", "") == converse("ab", "cd")[0]


def test_the_seed_wraps_around_after_the_largest(converse: Converse) -> None:
    _, err = converse(f"/seed {2**63 - 1}", "/max-new-tokens 3", "ab", "cd")
    assert err == ""


def test_a_seed_restarts_the_random_streams(converse: Converse) -> None:
    out, _ = converse("ab", "/reset", "/seed 7", "ab", "/reset", "/seed 7", "ab")
    text = out.partition("seed 7\n")[2]
    assert text.partition("seed 7\n")[0] == text.partition("seed 7\n")[2]


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("/temperature -1", "temperature must be from 0 (greedy) to 1,000,000"),
        ("/temperature warm", "/temperature: expected a number, got 'warm'"),
        ("/top-k 0", "top-k must be at least 1"),
        ("/top-k 1.5", "/top-k: expected a whole number or none, got '1.5'"),
        ("/seed none", "/seed: expected a whole number, got 'none'"),
        ("/seed -1", "seed must be"),
        ("/max-new-tokens 0", "max-new-tokens must be at least 1"),
        ("/window round", "/window: expected sliding or exact, got 'round'"),
        ("/ban €", "ban '€': character '€'"),
        ("/stop €", "stop '€': character '€'"),
        ("/temprature 1", "unknown command /temprature; did you mean /temperature?; /help lists all"),
        ("a€", "character '€' (U+20AC) at position 1"),
        ("a\udcff", "character '\\udcff'"),
    ],
)
def test_a_mistake_is_reported_in_one_line_and_the_loop_goes_on(
    line: str, expected: str, converse: Converse, generator: Generator
) -> None:
    out, err = converse(line, "ab")
    assert err.count("\n") == 1
    assert expected in err
    assert out == generator.generate("ab", Request(20)).text + "\n"


def test_help_lists_every_setting_with_its_value(converse: Converse) -> None:
    out, _ = converse("/help", "/quit", "ab")
    assert [line.split()[0] for line in out.splitlines()] == [*OPTIONS, "/reset", "/help", "/quit", "an"]
    assert "0.8  (takes a number)" in out


def test_ctrl_c_stops_a_generation_and_not_the_loop(
    converse: Converse, generator: Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    stream = Generator.stream

    def interrupted(self: Generator, prompt: str, request: Request) -> Iterator[str]:
        for number, piece in enumerate(stream(self, prompt, request)):
            if number == 5 and prompt == "ab":
                raise KeyboardInterrupt
            yield piece

    monkeypatch.setattr(Generator, "stream", interrupted)
    begun = generator.generate("ab", Request(5)).text
    rest = generator.generate(f"ab{begun}\ncd", Request(20, seed=1338)).text
    out, _ = converse(KeyboardInterrupt, "ab", "cd")
    assert out == f"\n{begun}\n{rest}\n"  # the first line break ends the abandoned line


def test_a_conversation_of_questions(converse: Converse, runs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = InferenceConfig(qa_template="Q: {question}?\nA: ", qa_stop="s")
    generator = Generator.from_export(runs / "tiny" / "artifacts" / "export", settings=settings)
    first = generator.generate_qa("why", Request(20))
    prompt = f"{first.prompt}{first.text}sQ: how?\nA: "
    second = generator.generate(prompt, generator.qa_request(Request(20, seed=1338)))
    out, _ = converse("why", "", "how", words=QA)
    assert out == f"{first.text}\n{second.text}\n"


def test_speeds_are_reported_after_each_turn(converse: Converse, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("utils.inference.stats.read_limit", lambda _: 1e10)
    _, err = converse("ab", "/reset", "abc", words=("--stats",))
    assert [line for line in err.splitlines() if line.startswith("prompt")] == [
        "prompt   2 tokens",
        "prompt   3 tokens",
    ]


def test_lines_from_a_pipe_that_are_not_utf_8_are_errors(
    run_inference: Main, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], generator: Generator
) -> None:
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(b"\xff\nab\n"), encoding="utf-8"))
    assert run_inference("--interactive") == 0
    captured = capsys.readouterr()
    assert captured.err.startswith("error: character '\\udcff' ")
    assert captured.out == generator.generate("ab", Request(20)).text + "\n"


# ------------------------------------------------------------------------------ mistakes


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["--temperature=-1"], "--temperature: expected number >= 0 and <= 1000000, got '-1'"),
        (["--temperature", "nan"], "--temperature: expected number"),
        (["--top-k", "0"], "--top-k: expected integer >= 1 or none, got '0'"),
        (["--top-p", "0"], "--top-p: expected number > 0 and <= 1 or none, got '0'"),
        (["--min-p", "2"], "--min-p: expected number"),
        (["--repetition-penalty", "0"], "--repetition-penalty: expected number"),
        (["--samples", "1000000000000000"], "--samples: expected a whole number from 1 to 1,000,000, got '1000"),
        (["--max-new-tokens", "0"], "--max-new-tokens: expected integer >= 1 and <= 1000000, got '0'"),
        (["--samples", "0"], "--samples: expected a whole number from 1"),
        (["--batch-size=-1"], "--batch-size: expected a whole number from 1"),
        (["--seed", "-1"], "seed must be"),
        (["--ban", "€"], "ban '€': character '€'"),
        (["--ban", ""], "ban: expected text"),
        (
            ["--ban", "".join(TOKENIZER.decode(range(TOKENIZER.vocab_size)))],
            "all 35 tokens of the vocabulary are banned",
        ),
        (["--stop", "x€"], "stop 'x€': character '€' (U+20AC) at position 1"),
        (["--stop", ""], "stop: expected text"),
        (["--prompt", "a€"], "character '€' (U+20AC) at position 1"),
        (["--prompt", "a\udcff"], "character '\\udcff' (U+DCFF) at position 1"),
        (["--window", "round"], "argument --window: expected sliding or exact, got 'round'"),
        (["--mode", "chat"], "argument --mode: expected text or qa, got 'chat'"),
        (["--weights", "bfloat16", "--quantize", "int8"], "not allowed with argument"),
        (["--prompt", "a", "--interactive"], "not allowed with argument --prompt"),
        (["--prompt", "a", "--prompt-file", "x"], "not allowed with argument --prompt"),
        (["--draft", "nobody"], "no run nobody"),
        (["--draft", "ngram", "--window", "exact"], "--draft needs --window sliding, not exact"),
        (["--draft", "ngram", "--samples", "2", "--batch-size", "2"], "one sequence at a time: batch_size must be 1"),
        (["--draft-tokens", "0"], "--draft-tokens: expected a whole number from 1"),
        (["--draft", "ngram", "--draft-tokens", "15"], "draft-tokens must be at most 14, not 15"),
        (["--out", "x"], "--out cannot go with one RUN; it goes with: --prompt-file"),
        (["--interactive", "--samples", "2"], "--samples cannot go with --interactive"),
        (["--html", "x.html"], "--html cannot go with one RUN; it goes with: several RUNs"),
        (["--prompt-file", "nowhere.txt"], "nowhere.txt: cannot be read: No such file or directory"),
        (["--mode", "qa", "--prompt", "€"], "character '€' (U+20AC) at position 0"),
        (["--temperature", "warm"], "--temperature: expected number"),
        (["--device", "cuda:7"], "not available here"),
        (["--prompd", "x"], "did you mean --prompt?"),
    ],
)
def test_a_mistake_is_reported_in_one_line(
    words: list[str], expected: str, run_inference: Main, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run_inference(*words) == 2
    assert expected in one_error(capsys)


@pytest.mark.parametrize(("name", "expected"), [("two", "no run two in"), ("20", "ambiguous")])
def test_an_unknown_or_ambiguous_run_is_not_guessed(
    name: str, expected: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for tag in ("one", "other"):
        save_tiny_run(tmp_path, f"20260131_142501_{tag}")
    assert inference.main([name, "--runs-dir", str(tmp_path)]) == 2
    assert expected in one_error(capsys)


@pytest.mark.parametrize("name", ["model.safetensors", "config.json", "tokenizer.json"])
def test_a_damaged_file_of_an_export_is_named(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = save_tiny_run(tmp_path, "one") / "artifacts" / "export" / name
    path.write_bytes(path.read_bytes()[:-20])
    assert inference.main(["one", "--runs-dir", str(tmp_path)]) == 2
    assert name in one_error(capsys)
    path.unlink()
    assert inference.main(["one", "--runs-dir", str(tmp_path)]) == 2
    assert f"{name} missing" in one_error(capsys)


def test_an_export_of_another_version_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = save_tiny_run(tmp_path, "old") / "artifacts" / "export" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"format_version": 99}))
    assert inference.main(["old", "--runs-dir", str(tmp_path)]) == 2
    assert "config.json: format version 99, this workbench reads 1" in one_error(capsys)


# ------------------------------------------------------------------------------ several runs, scores, facts


@pytest.fixture(scope="module")
def two_runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("two")
    save_tiny_run(folder, "one")
    save_tiny_run(folder, "two", n_layer=1)
    return folder


def test_runs_are_shown_side_by_side(two_runs: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    page = tmp_path / "page.html"
    words = ["--prompt", "an", "--max-new-tokens", "5", "--logprobs", "--html", str(page), "--runs-dir", str(two_runs)]
    assert inference.main(["one", "two", *words, "--temperature", "0"]) == 0
    out = capsys.readouterr().out
    assert "one" in out
    assert "two" in out
    assert out.count("mean logprob") == 2
    assert page.read_text(encoding="utf-8").startswith("<!DOCTYPE html>")
    assert "temperature 0, " in page.read_text(encoding="utf-8")


def test_runs_scores_and_facts_are_lines_of_json(
    two_runs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "s.txt").write_text("an ant")

    def lines(*words: str) -> list[dict[str, Any]]:
        assert inference.main(["one", "two", *words, "--json", "--runs-dir", str(two_runs)]) == 0
        return [json.loads(line) for line in capsys.readouterr().out.splitlines()]

    found = lines("--prompt", "an", "--max-new-tokens", "5", "--samples", "2")
    assert [line["run"].rpartition("_")[2] for line in found] == ["one", "one", "two", "two"]
    assert all(line["prompt"] == "an" and line["tokens"] == 5 for line in found)
    one, smaller, *_ = lines("--score", str(tmp_path / "s.txt"), "--quantize", "int8")
    assert (one["weights"], smaller["weights"], one["tokens"]) == ("float32", "int8", 5)
    assert one["bits_per_byte"] == pytest.approx(one["loss"] * 5 / math.log(2) / one["bytes"])
    one, two = lines("--show-info")
    assert [line["training"]["run"].rpartition("_")[2] for line in (one, two)] == ["one", "two"]
    assert one["parameters"] == sum(module["parameters"] for module in one["modules"])


def test_runs_are_compared_on_a_terminal_without_utf_8(two_runs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for words in (["two", "--prompt", "ü"], ["--show-info"]):
        stdout = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
        monkeypatch.setattr("sys.stdout", stdout)
        assert inference.main(["one", *words, "--runs-dir", str(two_runs)]) == 0
        monkeypatch.undo()


def test_a_page_that_cannot_be_written_is_reported_in_one_line(
    two_runs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.replace", full)
    page = tmp_path / "page.html"
    assert inference.main(["one", "two", "--html", str(page), "--runs-dir", str(two_runs)]) == 2
    assert capsys.readouterr().err == f"error: {page}: cannot be written: No space left on device\n"


def test_an_unknown_character_of_a_scored_text_is_named_with_its_line(
    two_runs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "s.txt").write_text("ab\na€", encoding="utf-8")
    assert inference.main(["one", "--score", str(tmp_path / "s.txt"), "--runs-dir", str(two_runs)]) == 2
    assert "s.txt:2: character '€'" in one_error(capsys)


def test_a_score_shows_the_cost_of_smaller_weights(
    two_runs: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    text = tmp_path / "text.txt"
    text.write_text("a question and an answer\n" * 5)
    assert inference.main(["one", "--score", str(text), "--quantize", "int8", "--runs-dir", str(two_runs)]) == 0
    out = capsys.readouterr().out
    assert "perplexity" in out
    assert "int8 - float32" in out


def test_show_info_describes_a_run(two_runs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert inference.main(["one", "--show-info", "--runs-dir", str(two_runs)]) == 0
    out = capsys.readouterr().out
    assert "architecture" in out
    assert "vocabulary" in out


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["one", "--html", "page.html"], "--html cannot go with one RUN; it goes with: several RUNs"),
        (["one", "--logprobs"], "--logprobs cannot go with one RUN; it goes with: several RUNs"),
        (
            ["one", "two", "--stats"],
            "--stats cannot go with several RUNs; it goes with: one RUN, --prompt-file, --interactive",
        ),
        (
            ["one", "--score", "s.txt", "--temperature", "1"],
            "--temperature cannot go with --score; it goes with: one RUN, several RUNs, --prompt-file, --interactive",
        ),
        (["one", "two", "--show-info", "--html", "x.html"], "--html cannot go with --show-info"),
        (["one", "--show-info", "--quantize", "int8"], "--quantize cannot go with --show-info"),
        (["one", "two", "--prompt", "€"], "one/artifacts/export: character '€'"),
        (["one", "--prompt", "-ab"], "a value that begins with a dash is written --FLAG=VALUE"),
        (["one", "two", "--interactive"], "--interactive is for one RUN"),
        (["one", "--score", "missing.txt"], "missing.txt: cannot be read"),
    ],
)
def test_flags_that_exclude_each_other_are_reported_in_one_line(
    two_runs: Path, capsys: pytest.CaptureFixture[str], words: list[str], message: str
) -> None:
    assert inference.main([*words, "--runs-dir", str(two_runs)]) == 2
    assert message in one_error(capsys)


def test_every_option_belongs_to_some_mode_or_to_all() -> None:
    parser = argparse.ArgumentParser()
    inference.add_arguments(parser)
    flags = {action.dest for action in parser._actions} | InferenceConfig.model_fields.keys()
    assert flags == inference.OPTIONS | {"help", "runs", "device", "runs_dir"} | inference.MODES.keys() - {"compare"}


def test_an_unknown_character_can_be_read_as_another_one(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = save_tiny_run(tmp_path / "runs", "tiny")
    text = tmp_path / "text.txt"
    text.write_text("☃" * 20)
    for words in (("--prompt", "☃"), ("--score", str(text))):
        assert inference.main([str(run), *words]) == 2
        assert "--unknown-token" in capsys.readouterr().err
        stand_in = TOKENIZER.decode([1])
        assert inference.main([str(run), *words, f"--unknown-token={stand_in}"]) == 0
        capsys.readouterr()
