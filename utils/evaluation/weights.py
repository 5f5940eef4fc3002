"""Loads the model of a run: its export, or a checkpoint if it has none yet."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from model import LanguageModel
from tokenizer import Tokenizer, tokenizer_from_json
from utils.checkpoints.choose import choose_checkpoint
from utils.checkpoints.folder import TOKENIZER_FILE, CheckpointError
from utils.config.settings import ModelConfig
from utils.errors import UserError
from utils.files import expand_home
from utils.inference.adapters import without_adapters
from utils.inference.export import load_export
from utils.inference.quantization import Weights, with_weights
from utils.runs.find import is_export, resolve_run
from utils.runs.index import read_settings
from utils.runs.layout import CHECKPOINTS, EXPORT
from utils.runs.run import read_record


@dataclass(frozen=True)
class Trained:
    """A trained model in eval mode, and its origin.

    run: the run directory; None for an export that was copied without it.
    name: name of the run, for messages.
    step: number of updates of the weights, if known.
    weights: precision of the weights: float32, bfloat16 or int8.
    document_token: `LanguageModel.document_token` in training, the token that each text began with.
    """

    model: LanguageModel
    tokenizer: Tokenizer
    run: Path | None
    name: str
    step: int | None
    weights: Weights
    document_token: int | None = None

    def settings(self) -> dict[str, Any]:
        """The settings of the run, by leaf name.

        Raises:
            UserError: the export has no run, or the settings cannot be read.
        """
        if self.run is None:
            raise UserError(f"{self.name}: an export without its run has no data of its own")
        try:
            return read_settings(self.run)
        except (OSError, ValueError, RecursionError) as error:
            raise UserError(f"{self.name}: its settings cannot be read: {error}") from None

    def check_corpus(self, corpus_hash: str, remedy: str) -> None:
        """Raises UserError if the run is known to have been trained on a corpus with another hash."""
        record = read_record(self.run) if self.run is not None else {}
        recorded = (record.get("resolved") or {}).get("corpus_hash")
        if recorded not in (None, corpus_hash):
            found = f"sha256 {corpus_hash[:12]}..., not {str(recorded)[:12]}..."
            raise UserError(f"{self.name}: its data has changed since it was trained ({found}); {remedy}")


def load_trained(
    name: str,
    runs_dir: Path,
    device: torch.device,
    weights: Weights = "float32",
    checkpoint: str | None = None,
    report: Callable[[str], None] = lambda message: None,
) -> Trained:
    """Load the model of the run `name`, or the export at the path `name`.

    Args:
        checkpoint: `latest`, `best` or a step; None for the export or, if the run has none, the newest checkpoint.
        report: prints one line to the user.

    Raises:
        UserError: there is no such run, export or checkpoint, or it is damaged.
    """
    place = Path(expand_home(name))
    if name and is_export(place):
        run, export = None, place
    else:
        run = Path(resolve_run(name, runs_dir)).absolute()
        export = run / EXPORT
    if checkpoint is None and (run is None or export.is_dir()):
        found = load_export(export, device)
        step = found.training.get("step")
        title = run.name if run else str(found.training.get("run", place))
        model, tokenizer, document_token = found.model, found.tokenizer, found.document_token
    else:
        if run is None:
            raise CheckpointError(f"{name}: an export has no checkpoints")
        packed = False
        chosen = choose_checkpoint(run / CHECKPOINTS, checkpoint or "latest", strict=False, warn=report)
        chosen = without_adapters(chosen)
        if checkpoint is None:
            report(f"{run.name} has no export yet: these are the weights of step {chosen.step:,}")
        tokenizer = tokenizer_from_json(chosen.tokenizer, str(chosen.path / TOKENIZER_FILE))
        model = LanguageModel(ModelConfig.model_validate(chosen.state["model"]), tokenizer.vocab_size)
        model.load_state_dict(chosen.weights)
        model, step, title = model.to(device).eval(), chosen.step, run.name
        with contextlib.suppress(OSError, ValueError, RecursionError):  # without settings, assume the default
            packed = read_settings(run).get("packing", "random") != "random"
        document_token = tokenizer.end_of_text if packed else None
    return Trained(
        model if weights == "float32" else with_weights(model, weights),
        tokenizer,
        run,
        title,
        step if isinstance(step, int) else None,
        weights,
        document_token,
    )
