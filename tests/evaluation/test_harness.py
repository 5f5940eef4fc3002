"""Tasks of lm-evaluation-harness give the numbers of its own model class at any batch size; records; mistakes."""

from __future__ import annotations

import json
import math
import random
import statistics
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import tokenizers
from fake_runs import make_run

import evaluate
import experiments
import weights
from tests.tiny_export import tiny_model
from tokenizer import Tokenizer, build_tokenizer
from utils.config.settings import DataConfig
from utils.evaluation import harness_tasks
from utils.evaluation.weights import Trained
from utils.files import write_json
from utils.inference.export import save_export
from utils.runs.evaluations import append_evaluation, read_evaluations
from utils.runs.layout import EXPORT, PRETRAINED
from utils.tokenization.subwords import HuggingFaceTokenizer

BYTES = build_tokenizer(DataConfig(tokenizer="byte"), ())
BATCH_SIZES = (1, 3, 32)
TOLERANCE = 1e-4  # nats of a continuation
BLOCK_SIZE = 24


def requests_for(words: Sequence[str], kind: str) -> list[Any]:
    """Requests, some of which share a context, and some of which exceed BLOCK_SIZE."""
    rng, found = random.Random(0), []
    for number in range(24):
        context = " ".join(rng.choices(words, k=rng.choice((1, 3, 8))))
        if kind == "generate_until":
            found.append((context, {"until": [" c", "\n"], "max_gen_toks": 8, "do_sample": False}))
            continue
        if kind == "loglikelihood_rolling":
            found.append((context * 3,))
            continue
        for _ in range(rng.choice((1, 2, 4))):
            found.append((context if number else "", " " + " ".join(rng.choices(words, k=rng.choice((1, 2, 3))))))
    return [SimpleNamespace(args=args) for args in found]


def with_token_before(tokenizer: Tokenizer) -> HuggingFaceTokenizer:
    """The tokenizer of a published model, which transformers begins each text of with <|begin|>."""
    facts = json.loads(tokenizer.huggingface())
    library = tokenizers.Tokenizer.from_str(json.dumps(facts))
    begin = ("<|begin|>", library.token_to_id("<|begin|>"))
    library.post_processor = tokenizers.processors.TemplateProcessing(single="<|begin|> $A", special_tokens=[begin])
    return HuggingFaceTokenizer(library.to_str())


@pytest.mark.slow
@pytest.mark.parametrize("began_with", ["nothing", "a published model"])
@pytest.mark.parametrize("position", ["learned", "rope"])
def test_results_equal_those_of_the_harness_for_transformers(tmp_path: Path, position: str, began_with: str) -> None:
    """Our class has the model of the run, the harness's the export of the run for transformers."""
    from lm_eval.models.huggingface import HFLM

    from utils.evaluation.harness import HarnessModel

    tokenizer = build_tokenizer(
        DataConfig(tokenizer="bpe", bpe_vocab_size=300, special_tokens=("<|begin|>",)),
        ["once upon a time a cat sat on a mat"],
    )
    llama = {"norm": "rmsnorm", "mlp": "swiglu"} if position == "rope" else {"bias": True}
    model = tiny_model(tokenizer, block_size=BLOCK_SIZE, position=position, **llama)
    run = make_run(tmp_path / "runs", "bytes")
    if began_with == "a published model":  # whose tokenizer puts a token before each text
        tokenizer = with_token_before(tokenizer)
        facts = {"tokenizer_config": {"bos_token": "<|begin|>", "eos_token": "<|endoftext|>"}}
        write_json(run / PRETRAINED, facts)
    save_export(run / EXPORT, model, tokenizer, {"run": "bytes", "step": 100})
    folder = tmp_path / "hf"
    assert weights.main(["export", "bytes", "--runs-dir", str(run.parent), "--format", "hf", "--out", str(folder)]) == 0
    theirs = HFLM(str(folder), batch_size=4, device="cpu", dtype="float32")
    words = ["a", "cat", "sat", "upon", "once", "mat", "xyz"]
    trained = Trained(model, tokenizer, run, "tiny", 1, "float32")
    for kind in ("loglikelihood", "loglikelihood_rolling", "generate_until"):
        requests = requests_for(words, kind)
        expected = getattr(theirs, kind)(requests, disable_tqdm=True)
        for batch_size in BATCH_SIZES:
            found = getattr(HarnessModel(trained, batch_size), kind)(requests)
            if kind == "loglikelihood":
                assert [greedy for _, greedy in found] == [greedy for _, greedy in expected]
                found, reference = [logprob for logprob, _ in found], [logprob for logprob, _ in expected]
            else:
                reference = expected
            if kind == "generate_until":
                assert found == reference
                assert any(found)
            else:
                assert found == pytest.approx(reference, abs=TOLERANCE, rel=1e-5)


@pytest.fixture
def runs(tmp_path: Path) -> Path:
    for name, layers in (("small", 1), ("large", 3)):
        run = make_run(tmp_path / "runs", name)
        save_export(run / EXPORT, tiny_model(BYTES, n_layer=layers), BYTES, {"run": name, "step": 100})
    return tmp_path / "runs"


@pytest.mark.slow
def test_tasks_are_run_recorded_shown_and_compared(runs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """One test, because lm_eval takes seconds to import and to index its tasks."""
    words = ["--runs-dir", str(runs), "--device", "cpu"]
    tiny = ["--task", "tiny_choice,tiny_text,tiny_answer", "--few-shot", "1", *words]
    assert evaluate.main(["small", *tiny, "--json"]) == 0
    captured = capsys.readouterr()
    assert captured.err == ""
    choice, text, answer = json.loads(captured.out)["evaluations"]
    assert choice["problems"] == 12
    assert (choice["few_shot"], choice["task_version"], choice["harness"][:8]) == (1, 1.0, "lm_eval ")
    assert choice["accuracy"] == choice["metrics"]["acc"]
    assert choice["higher_is_better"]["acc"] is True
    share = choice["accuracy"]
    assert choice["errors"]["acc"] == pytest.approx(math.sqrt(share * (1 - share) / 11))
    assert text["higher_is_better"]["bits_per_byte"] is False
    assert "bits_per_byte" not in text["errors"]
    assert text["bits_per_byte"] == text["metrics"]["bits_per_byte"]
    assert answer["metrics"].keys() == {"exact_match"}
    recorded, problem = read_evaluations(runs / "small")
    assert [{"run": "small", **record} for record in recorded] == [choice, text, answer]
    assert problem is None
    experiments.main(["show", "small", "--runs-dir", str(runs)])
    assert "tiny_choice" in capsys.readouterr().out

    for batch_size in (1, 5):  # the same hash and results
        assert evaluate.main(["small", *tiny, "--json", "--no-record", "--batch-size", str(batch_size)]) == 0
        for again, first in zip(
            json.loads(capsys.readouterr().out)["evaluations"], (choice, text, answer), strict=True
        ):
            assert again["metrics"] == pytest.approx(first["metrics"], rel=1e-5)
            assert again["data_hash"] == first["data_hash"]

    assert evaluate.main(["small", "--task", "tiny_choice", "--limit", "5", *words, "--json"]) == 0
    (limited,) = json.loads(capsys.readouterr().out)["evaluations"]
    assert (limited["problems"], limited["limit"], limited["few_shot"]) == (5, 5, 0)
    assert limited["data_hash"] != choice["data_hash"]

    assert evaluate.main(["small", "large", "--task", "tiny_choice,tiny_text", *words, "--compare"]) == 0
    table = capsys.readouterr().out
    for quantity in ("tiny_choice: acc (±", "tiny_text: bits_per_byte", "parameters", "prefill, tokens/s", "decode"):
        assert quantity in table
    assert table.splitlines()[0].split() == ["small", "large"]

    assert evaluate.main(["small", "--task", "tiny_choise", *words]) == 2
    assert "unknown task tiny_choise; did you mean tiny_choice?" in capsys.readouterr().err
    assert evaluate.main(["small", "--task", "tiny_choice,tiny_answer", "--few-shot", "5", *words]) == 2
    assert "error: tiny_choice: --few-shot 5: it has only 4 examples" in capsys.readouterr().err
    folder = runs.parent / "data"
    folder.mkdir()
    assert evaluate.main(["small", "--task", "hellaswag", "--task-data", str(folder), *words]) == 2
    assert f"{folder} has no dataset Rowan/hellaswag: expected" in capsys.readouterr().err
    (folder / "hellaswag").mkdir()
    question = {"ind": 1, "activity_label": "a", "ctx_a": "a cat", "ctx_b": "sat", "ctx": "a cat sat", "split": "val"}
    question |= {"endings": ["on", "off", "up", "in"], "label": "0", "source_id": "a", "split_type": "a"}
    for split in ("train", "validation"):
        (folder / "hellaswag" / f"{split}.jsonl").write_text(json.dumps(question) + "\n")
    assert evaluate.main(["small", "--task", "hellaswag", "--task-data", str(folder), *words]) == 0
    assert "hellaswag  acc" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--task", "arithmetic,hellaswag"], "arithmetic cannot be combined with other tasks"),
        (["--task", "hellaswag,"], "--task: expected names separated by commas, got 'hellaswag,'"),
        (["--few-shot", "2"], "--few-shot is for the tasks of lm-evaluation-harness"),
        (["--task", "arithmetic", "--limit", "2"], "--limit is for the tasks of lm-evaluation-harness"),
        (["--task", "hellaswag", "--limit", "0"], "--limit must be at least 1, not 0"),
        (["--task", "hellaswag", "--task-data", "nowhere"], "--task-data nowhere: no such folder"),
        (["--compare"], "--compare needs at least two RUNs"),
        (["--task", "hellaswag"], "tasks other than arithmetic need lm-evaluation-harness: pip install"),
    ],
)
def test_a_mistake_is_reported_in_one_line(
    words: list[str], message: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(harness_tasks.importlib.util, "find_spec", lambda name: None)
    assert evaluate.main(["small", *words]) == 2
    assert message in capsys.readouterr().err


def test_two_texts_are_compared_by_quality_and_speed(runs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = runs.parent / "text.txt"
    text.write_text("the quick brown fox jumps over the lazy dog " * 3)
    words = ["small", "large", "--compare", "--data", str(text), "--runs-dir", str(runs), "--device", "cpu"]
    assert evaluate.main([*words, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    small, large = found["speeds"]
    assert small["parameters"] < large["parameters"]
    assert small["decode"] > 0
    assert [record["run"] for record in found["evaluations"]] == ["small", "large"]
    assert evaluate.main(words) == 0
    assert "text.txt: bits/byte" in capsys.readouterr().out


def test_a_recorded_metric_that_is_nan_is_kept(tmp_path: Path) -> None:
    run = make_run(tmp_path, "run")
    append_evaluation(run, {"time": "2026", "data": "x", "task": "x", "metrics": {"f1": float("nan"), "acc": 0.5}})
    (found,), problem = read_evaluations(run)
    assert found["metrics"]["f1"] != found["metrics"]["f1"]
    assert (found["metrics"]["acc"], problem) == (0.5, None)


def test_the_best_value_that_is_not_nan_is_highlighted() -> None:
    facts = {"task": "t", "few_shot": 0, "problems": 10, "data_hash": "d"}
    scores = [float("nan"), 0.2, 0.1]
    directions = {"acc": True, "ter": False, "pct_stereotype": None}
    records = [
        {**facts, "metrics": dict.fromkeys(directions, score), "higher_is_better": directions} for score in scores
    ]
    (table,) = harness_tasks.tasks_screen(["a", "b", "c"], records)
    styles = [[str(cell.style) for cell in column._cells] for column in table.columns[4:]]
    assert styles == [["", "", ""], ["bold green", "", ""], ["", "bold green", ""]]


def test_the_error_of_a_metric_is_the_standard_error_of_its_mean() -> None:
    shares = [1.0, 0.0, 1.0, 1.0]
    p = statistics.fmean(shares)
    assert harness_tasks.error_of_mean(shares, p) == pytest.approx(math.sqrt(p * (1 - p) / 3))
    probabilities = [0.4, 0.5, 0.6, 0.5]  # the documents of truthfulqa_mc2
    assert harness_tasks.error_of_mean(probabilities, 0.5) == pytest.approx(statistics.stdev(probabilities) / 2)
    assert harness_tasks.error_of_mean(probabilities, 1.65) is None  # such as a perplexity
    assert harness_tasks.error_of_mean([[1, 2], [3, 4]], 0.5) is None
    assert harness_tasks.error_of_mean([1.0], 1.0) is None
