"""The first minutes in a notebook: train, resume the run, look at it, and generate from it.

python -m examples.quickstart
"""

from __future__ import annotations

from typing import Any

from workbench import Generator, Request, SamplingOptions, get_model_info, resume, runs, train


def main(**settings: Any) -> str:
    """Train with these settings in two sessions, and return a text that the model generates."""
    results = train({"max_iters": 500, "stop_at_step": 250, "run_tag": "quickstart", **settings})
    results = resume(results.run_dir)  # to the last step, with the same bits as without the stop
    print(f"val loss {results['val_loss']:.4f} after {results.steps:,} steps")

    run = runs.find("quickstart")
    for step, loss in run.metrics("val/loss"):
        print(f"step {step:>5,}  val loss {loss:.4f}")
    print(get_model_info(run)["architecture"])

    request = Request(max_new_tokens=200, options=SamplingOptions(temperature=0.8, top_k=40), seed=1)
    return Generator.from_run("quickstart").generate("The ", request).text


if __name__ == "__main__":
    print(main())
