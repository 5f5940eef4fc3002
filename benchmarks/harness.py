"""How fast are tasks of lm-evaluation-harness answered? Our class against the package's own for transformers (HFLM).

python -m benchmarks.harness                 # 200 questions with four answers, a model of 10.7M parameters
python -m benchmarks.harness --documents 50 --vocabulary 512

Both have the same weights, questions and batch size, and take turns. Times are processor seconds, which other processes
hardly change; with one thread, they are the seconds that it takes on an idle machine. The ratio is of the medians.
Questions are like those of HellaSwag: 60 to 100 tokens before each of four endings of 10 to 30. The answers must be the
same.
"""

from __future__ import annotations

import random
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np

from benchmarks.common import machine_facts, verdict
from utils.terminal.cli import Parser, script

CHOICES = 4
GOAL = 1.5  # times as fast as HFLM


@script
def main(argv: Sequence[str]) -> int:
    parser = Parser(prog="benchmarks.harness", description=__doc__)
    parser.add_argument("--documents", type=int, default=200, metavar="N", help="questions (default: 200)")
    parser.add_argument(
        "--vocabulary", type=int, default=4096, metavar="N", help="tokens of the vocabulary (default: 4096)"
    )
    parser.add_argument("--batch-size", type=int, default=32, metavar="N", help="sequences of a batch (default: 32)")
    parser.add_argument("--rounds", type=int, default=3, metavar="N", help="how often each is timed (default: 3)")
    parser.add_argument("--threads", type=int, default=1, metavar="N", help="threads of torch (default: 1)")
    args = parser.parse(argv)
    import torch

    torch.set_num_threads(args.threads)
    from utils.evaluation.harness_tasks import require_harness

    require_harness()
    with tempfile.TemporaryDirectory() as folder:
        ours, theirs = models(Path(folder), args.vocabulary, args.batch_size)
        requests = questions(args.documents, ours.trained.tokenizer)
        times: dict[str, list[float]] = {"ours": [], "HFLM": []}
        found = {}
        for _ in range(args.rounds):
            for name, model in (("ours", ours), ("HFLM", theirs)):
                began = time.process_time()
                found[name] = model.loglikelihood(requests, disable_tqdm=True)
                times[name].append(time.process_time() - began)
    print(machine_facts())
    medians = {name: statistics.median(seconds) for name, seconds in times.items()}
    for name, seconds in medians.items():
        print(f"{name:5} {seconds:7.2f} s  {args.documents / seconds:6.1f} documents/s  {picks(found[name])[:10]}")
    largest = max(abs(a[0] - b[0]) for a, b in zip(found["ours"], found["HFLM"], strict=True))
    same = np.mean(np.array(picks(found["ours"])) == np.array(picks(found["HFLM"])))
    ratio = medians["HFLM"] / medians["ours"]
    print(f"same answers {same:.1%}, log-probabilities within {largest:.1e} nats")
    print(f"HFLM / ours {ratio:.2f}: {verdict(ratio >= GOAL and same == 1)}")
    return 0


def models(folder: Path, vocabulary: int, batch_size: int) -> tuple[Any, Any]:
    """Our class, and HFLM with the export of the same weights: 6 layers, 6 heads, width 384, context 256."""
    import torch
    from lm_eval.models.huggingface import HFLM

    import weights
    from model import LanguageModel
    from tokenizer import build_tokenizer
    from utils.config.settings import DataConfig, ModelConfig
    from utils.evaluation.harness import HarnessModel
    from utils.evaluation.weights import Trained
    from utils.inference.export import save_export

    torch.manual_seed(0)
    tokenizer = build_tokenizer(DataConfig(tokenizer="bpe", bpe_vocab_size=vocabulary), [words(50_000)])
    config = ModelConfig(n_layer=6, n_head=6, n_embd=384, block_size=256, position="learned")
    model = LanguageModel(config, tokenizer.vocab_size).eval()
    save_export(folder / "trained", model, tokenizer, {"run": "benchmark", "step": 0})
    weights.main(["export", str(folder / "trained"), "--format", "hf", "--out", str(folder / "hf")])
    trained = Trained(model, tokenizer, None, "benchmark", 0, "float32")
    return HarnessModel(trained, batch_size), HFLM(
        str(folder / "hf"), batch_size=batch_size, device="cpu", dtype="float32"
    )


def words(count: int, seed: int = 0) -> str:
    """A text of made-up words, some far more frequent than others."""
    rng = random.Random(seed)
    known = ["".join(rng.choices("abcdefghijklmnopqrstuvwxyz", k=rng.randint(2, 9))) for _ in range(8000)]
    weights = [1 / rank for rank in range(1, len(known) + 1)]
    return " ".join(rng.choices(known, weights, k=count))


def questions(documents: int, tokenizer: Any) -> list[Any]:
    """Requests for the log-probability of each ending of each question."""
    rng, tokens = random.Random(1), tokenizer.encode(words(documents * 200, seed=0))
    cut: Callable[[int], str] = lambda count: tokenizer.decode(take(rng, tokens, count)).strip()  # noqa: E731
    found = []
    for _ in range(documents):
        context = cut(rng.randint(60, 100))
        found += [SimpleNamespace(args=(context, " " + cut(rng.randint(10, 30)))) for _ in range(CHOICES)]
    return found


def take(rng: random.Random, tokens: Sequence[int], count: int) -> list[int]:
    start = rng.randrange(len(tokens) - count)
    return list(tokens[start : start + count])


def picks(found: Sequence[tuple[float, bool]]) -> list[int]:
    """The most likely ending of each question."""
    logprobs = np.array([logprob for logprob, _ in found]).reshape(-1, CHOICES)
    return [int(best) for best in logprobs.argmax(1)]


if __name__ == "__main__":
    sys.exit(main())
