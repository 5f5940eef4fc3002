"""The runs that are served, by the names that requests use."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from utils.config.settings import DataConfig, InferenceConfig
from utils.errors import UserError, nearest, shown
from utils.inference.export import document_token
from utils.inference.generator import Generator
from utils.inference.quantization import WeightsChoice
from utils.runs.metrics import decode_number
from utils.serving.chat import Template, find_template
from utils.serving.schemas import Model


@dataclass(frozen=True)
class Served:
    """A run with its model.

    name: the `model` in requests.
    begin: the token that each text begins with, if the model was trained on whole documents.
    """

    name: str
    generator: Generator
    template: Template | None
    created: int

    @property
    def begin(self) -> int | None:
        return document_token(self.generator.tokenizer, self.generator.training)

    @property
    def context(self) -> int:
        return self.generator.model.config.block_size

    def described(self) -> Model:
        settings, training = self.generator.settings, self.generator.training
        names = ("max_new_tokens", "temperature", "top_k", "top_p", "min_p", "repetition_penalty")
        val_loss = training.get("val/loss")
        return Model(
            id=self.name,
            object="model",
            created=self.created,
            owned_by="workbench",
            run=self.generator.name,
            context=self.context,
            vocabulary=self.generator.tokenizer.vocab_size,
            val_loss=None if val_loss is None else decode_number(val_loss),
            chat=self.template is not None,
            defaults={name: getattr(settings, name) for name in names},
        )


class Runs:
    """The served runs. A request names one by its name or by its run id."""

    def __init__(self, served: Sequence[Served]) -> None:
        self.by_name: Mapping[str, Served] = {run.name: run for run in served}
        self._all = {run.generator.name: run for run in served} | dict(self.by_name)

    def find(self, name: str) -> Served | None:
        return self._all.get(name)

    def missing(self, name: str) -> str:
        """The message about a name that is not served."""
        names = ", ".join(self.by_name)
        return f"no model {shown(name)}{nearest(name, self._all)}; this server has {names}"


def load_runs(
    words: Sequence[str],
    exports: Sequence[Path],
    device: str,
    weights: WeightsChoice,
    settings: InferenceConfig,
    unknown_token: str | None = None,
) -> Runs:
    """Load the models of these exports, named by their words on the command line.

    If the word is a path, `latest` or empty, the name is the run id.

    Args:
        unknown_token: a character as which those outside the vocabulary are read; None: as in training.

    Raises:
        UserError: a damaged export, no such device, or one name for two runs.
    """
    served: dict[str, Served] = {}
    for word, export in zip(words, exports, strict=True):
        generator = Generator.from_export(export, device, weights, settings)
        for weight in generator.model.parameters():
            if weight.is_cpu:  # it may be mapped from a file that changes while the server runs
                weight.data = weight.data.clone()
        if unknown_token is not None:
            generator.tokenizer = generator.tokenizer.adjusted(DataConfig(unknown_token=unknown_token))
        name = generator.name if "/" in word or word in ("", "latest") else word
        if name in served:
            raise UserError(f"two runs have the name {name}: name one of them by its id")
        served[name] = Served(name, generator, find_template(export, generator), int(time.time()))
    return Runs(list(served.values()))
