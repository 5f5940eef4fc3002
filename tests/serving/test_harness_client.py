"""lm-evaluation-harness as a client of serve.py: `local-completions` gets the same numbers as evaluate.py."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest

import weights
from tests.tiny_export import TOKENIZER, save_tiny_run
from utils.evaluation.weights import Trained
from utils.inference.generator import Generator

pytestmark = [pytest.mark.slow, pytest.mark.xdist_group("serving")]

CONTEXTS = ("the", "a hat", "to the", "o")
ANSWERS = (" the", " hat", "e", " oat tea")


def test_local_completions_score_and_generate_like_evaluate(url: str, runs_dir: Path, tmp_path: Path) -> None:
    from lm_eval.models.openai_completions import LocalCompletionsAPI

    from utils.evaluation.harness import HarnessModel

    save_tiny_run(tmp_path / "runs", "alike", norm="rmsnorm", mlp="swiglu")
    folder = tmp_path / "hf"  # the client uses only its tokenizer, to count tokens
    words = ["alike", "--runs-dir", str(tmp_path / "runs"), "--format", "hf", "--out", str(folder)]
    assert weights.main(["export", *words]) == 0
    theirs = LocalCompletionsAPI(
        base_url=f"{url}/v1/completions",
        model="first",
        tokenizer=str(folder),
        tokenizer_backend="huggingface",
        max_length=64,
    )
    generator = Generator.from_run(str(runs_dir / "20260131_142501_first"), device="cpu")
    ours = HarnessModel(Trained(generator.model, TOKENIZER, None, "first", 1, "float32"))
    scored = [SimpleNamespace(args=(context, answer)) for context in CONTEXTS for answer in ANSWERS]
    found, expected = theirs.loglikelihood(scored, disable_tqdm=True), ours.loglikelihood(scored)
    assert [logprob for logprob, _ in found] == pytest.approx([logprob for logprob, _ in expected], abs=1e-3)
    assert [greedy for _, greedy in found] == [greedy for _, greedy in expected]
    asked = [SimpleNamespace(args=(context, {"until": ["\n"], "max_gen_toks": 8})) for context in CONTEXTS]
    assert theirs.generate_until(asked, disable_tqdm=True) == ours.generate_until(asked)
