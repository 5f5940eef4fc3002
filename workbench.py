"""The public interface: everything that a notebook or a callback imports, and nothing else.

Train, look at runs, generate:

    >>> from workbench import Generator, runs, train
    >>> results = train(max_iters=20, run_tag="baseline", quiet=True)
    >>> results.status
    'completed'
    >>> losses = runs.find("baseline").metrics("val/loss")  # [(step, loss), ...]
    >>> text = Generator.from_run("baseline").generate("The ").text

Settings have the names and checks of the command line. Give them as keywords (`learning_rate=3e-3`), as a mapping (flat
or by section), or as a Config. Settings that keywords and mappings leave out come from the files in configs/, as on the
command line; `load_config` returns the merged settings as a Config. A Config that you make yourself is complete: it has
the built-in defaults for the settings that you leave out, and ignores configs/. A mistake raises UserError.

Every name has its own example: `help(workbench.Request)`. A Callback runs your code inside the training loop.

There are filters for texts and functions that pack token ids. docs/data.md describes the whole pipeline of prepare.py:

    >>> from workbench import deduplication, language_filter, paragraph_length_filter, paragraph_repetition_filter
    >>> texts = ["Once upon a time there was a dog.", "Once upon a time there was a dog!", "Es war einmal ein Hund."]
    >>> [text for text in deduplication(texts) if language_filter(text, "en")]
    ['Once upon a time there was a dog.']
    >>> paragraph_length_filter("Too short."), paragraph_repetition_filter("Buy now!\\n" * 9)
    (False, False)
    >>> from workbench import add_special_tokens, pack_sequences
    >>> pack_sequences(add_special_tokens([[5, 6, 7], [8], [9, 9]], end_of_text=0), block_size=6)
    [[0, 5, 6, 7, 0, 8], [0, 9, 9]]

Importing this module does not import torch; the first name that needs it does.
"""

from __future__ import annotations

import functools
import hashlib
import importlib
import os
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias, cast

from utils.config.fields import FIELDS
from utils.config.loader import ConfigError, ConfigLoader, LoadedConfig, from_code
from utils.config.settings import (
    ArithmeticConfig,
    Config,
    DataConfig,
    InferenceConfig,
    ModelConfig,
    OptimizerConfig,
    TrackingConfig,
    TrainConfig,
)
from utils.errors import UserError, nearest, shown
from utils.files import expand_home, write_atomic
from utils.machine.process import tune_process
from utils.runs.find import find_export, resolve_run, resolve_runs
from utils.runs.index import read_index, read_run
from utils.runs.layout import CONFIG, CURVES, EXPORT, LOGS, METRICS_LOG
from utils.runs.log import read_metrics, read_records
from utils.runs.metrics import NOT_METRICS, Metric, register_metric
from utils.runs.origin import without_foreign_places
from utils.terminal.cli import PROJECT_ROOT
from utils.terminal.words import printable

if TYPE_CHECKING:  # these import torch or other large packages: `__getattr__` imports them on first use
    from rich.console import RenderableType

    from model import LanguageModel
    from tokenizer import Tokenizer
    from utils.corpora.filters import paragraph_length_filter, paragraph_repetition_filter
    from utils.corpora.language import language_filter
    from utils.inference.generator import Generator, Request
    from utils.inference.sampling import SamplingOptions
    from utils.packing.sequences import add_special_tokens, pack_sequences
    from utils.preparation.duplicates import deduplication
    from utils.runs.origin import Origin
    from utils.training.callbacks import Callback, TrainingRun
    from utils.training.result import TrainResult

__all__ = [
    "ArithmeticConfig",
    "Callback",
    "Comparison",
    "Config",
    "DataConfig",
    "Generator",
    "InferenceConfig",
    "Metric",
    "ModelConfig",
    "OptimizerConfig",
    "Request",
    "Run",
    "RunTable",
    "SamplingOptions",
    "TrackingConfig",
    "TrainConfig",
    "TrainResult",
    "TrainableModel",
    "Trainer",
    "TrainingRun",
    "UserError",
    "add_special_tokens",
    "compare",
    "create_model",
    "deduplication",
    "get_model_info",
    "language_filter",
    "load_config",
    "load_model",
    "load_pretrained",
    "pack_sequences",
    "paragraph_length_filter",
    "paragraph_repetition_filter",
    "register_metric",
    "resume",
    "runs",
    "train",
]

IMPORTED_LATER = {
    "Callback": "utils.training.callbacks",
    "Generator": "utils.inference.generator",
    "Request": "utils.inference.generator",
    "SamplingOptions": "utils.inference.sampling",
    "TrainResult": "utils.training.result",
    "TrainingRun": "utils.training.callbacks",
    "add_special_tokens": "utils.packing.sequences",
    "deduplication": "utils.preparation.duplicates",
    "language_filter": "utils.corpora.language",
    "pack_sequences": "utils.packing.sequences",
    "paragraph_length_filter": "utils.corpora.filters",
    "paragraph_repetition_filter": "utils.corpora.filters",
}

Settings: TypeAlias = Config | Mapping[str, Any]


def __dir__() -> list[str]:
    return __all__


# ------------------------------------------------------------------------------------------------ configuration


def load_config(*layers: Settings | str | Path, trust: bool = False, **settings: Any) -> Config:
    """The configuration that the command line would train with: the defaults, then configs/, `layers` and `settings`.

    In contrast, `Config()` has only the built-in defaults.

    Args:
        layers: files as for `--config`, relative to the current folder, or settings by name, flat or by section. Later
            layers override earlier ones; a Config, which has all settings, replaces everything before it.
        trust: accept the callbacks and output folders that a file in a run made elsewhere names (`--trust`).
        settings: settings by name, which override the layers.

    Raises:
        UserError: a mistake in the settings or in a file, or callbacks that are not trusted.

    >>> config = load_config({"model": {"n_layer": 2}}, learning_rate=3e-3)
    >>> config.model.n_layer, config.train.max_iters, Config().train.max_iters
    (2, 6, 2000)
    """
    loader = ConfigLoader(PROJECT_ROOT)
    loaded = loader.load()
    files: list[Path] = []
    for layer in (*layers, settings):
        if isinstance(layer, str | os.PathLike):
            files.append(Path(expand_home(os.fspath(layer))))
            loaded = loader.load_onto(loaded, files[-1:])
        else:
            loaded = _merge(loaded, layer, "files, or settings by name")
    return without_foreign_places(loaded, files, PROJECT_ROOT, trust).config


# ------------------------------------------------------------------------------------------------ training


def train(config: Settings | None = None, *, quiet: bool = False, strict: bool = False, **settings: Any) -> TrainResult:
    """Run one experiment: create a run directory, train, and export the model.

    Args:
        config: a Config, which is used as it is; or settings by name, flat or by section, on top of configs/.
        quiet: print only warnings.
        strict: raise an error for whatever the preflight reports.
        settings: settings by name, which override `config`.

    Returns:
        How the run ended, even if it diverged or was interrupted; `results["val_loss"]` is `results.val_loss`.

    Raises:
        UserError: there is a mistake in the settings; no run directory is created.
        Exception: the failure that ended the run.

    >>> results = train(max_iters=20, learning_rate=3e-3, quiet=True)
    >>> results["status"], results["steps"]
    ('completed', 20)
    >>> results.val_loss < 10
    True
    """
    return _train(_load(config, settings), quiet=quiet, strict=strict)


def resume(
    run: RunName, *, quiet: bool = False, strict: bool = False, trust: bool = False, **settings: Any
) -> TrainResult:
    """Continue a run that was interrupted, crashed or failed, from its newest checkpoint, bit for bit.

    Args:
        run: a path, id, tag, part of an id, `latest`, or a Run.
        quiet: print only warnings.
        strict: raise an error if the newest checkpoint is damaged; otherwise the one before it is used.
        trust: run the callbacks of a run that was made elsewhere (docs/security.md).
        settings: settings that a resume may change, such as `max_iters` if the schedule does not depend on it.

    Raises:
        UserError: there is no such run; it is being trained, complete, or has no good checkpoint; or a setting may not
            change.
        Exception: the failure that ended the run.

    >>> results = train(max_iters=20, stop_at_step=10, run_tag="stopped", quiet=True)
    >>> results.status, results.steps
    ('interrupted', 10)
    >>> resume("stopped", quiet=True).steps
    20
    """
    from utils.runs.origin import find_origin
    from utils.training.launch import config_of_resume

    for key in settings.keys() - FIELDS.keys():
        raise ConfigError(f"unknown key {key}{nearest(key, FIELDS)}")
    origin = find_origin("resume", os.fspath(run), _runs_dir(), strict=strict, trusted=trust)
    overrides = {key: from_code(key, value) for key, value in settings.items()}
    loaded = config_of_resume(origin, ConfigLoader(PROJECT_ROOT), overrides=overrides)
    return _train(loaded, quiet=quiet, origin=origin)


class Trainer:
    """An experiment as an object, for those who prefer `Trainer(config).train()` to `train(config)`.

    config: the merged configuration.
    results: the results of the last `train()`; None before it, or if it raised.

    Args:
        config: a Config, or settings by name, flat or by section.
        settings: settings by name, which override `config`.

    Raises:
        UserError: there is a mistake in the settings.

    >>> trainer = Trainer({"model": {"n_layer": 1}}, max_iters=20)
    >>> results = trainer.train(quiet=True)
    >>> "val_loss" in results, results["steps"]
    (True, 20)
    """

    def __init__(self, config: Settings | None = None, **settings: Any) -> None:
        self._loaded = _load(config, settings)
        self.results: TrainResult | None = None

    @property
    def config(self) -> Config:
        return self._loaded.config

    def __repr__(self) -> str:
        tag = self.config.tracking.run_tag
        ended = "not trained yet" if self.results is None else f"{self.results.status}, {self.results.run_dir}"
        return f"<Trainer{f' of {tag}' if tag else ''}: {ended}>"

    def train(self, *, quiet: bool = False, strict: bool = False) -> TrainResult:
        """Start a new run of this experiment; see the function `train`."""
        self.results = None  # if training raises, the results of an earlier run must not remain
        self.results = _train(self._loaded, quiet=quiet, strict=strict)
        return self.results


def _load(config: Settings | None, settings: Mapping[str, Any], base: LoadedConfig | None = None) -> LoadedConfig:
    """Merge `settings` over `config`; unless that is a Config, both over `base`, by default over configs/."""
    if config is not None:
        base = _merge(base, config, "a Config, or settings by name (load_config reads files)")
    return ConfigLoader(PROJECT_ROOT).load_code(settings, base)


def _merge(base: LoadedConfig | None, layer: Settings, expected: str) -> LoadedConfig:
    """Merge the settings of a mapping over `base`, by default over configs/; a Config, which has all, replaces `base`.

    Raises:
        UserError: `layer` is neither a mapping nor a Config, or has a mistake.
    """
    if isinstance(layer, Config):
        return LoadedConfig.from_config(layer)
    if not isinstance(layer, Mapping):
        raise UserError(f"expected {expected}, got {shown(layer)}")
    return ConfigLoader(PROJECT_ROOT).load_code(layer, base)


def _train(loaded: LoadedConfig, *, quiet: bool, strict: bool = False, origin: Origin | None = None) -> TrainResult:
    from train import train as train_run

    return train_run(loaded, origin=origin, quiet=quiet, root=PROJECT_ROOT, strict=strict)


# ------------------------------------------------------------------------------------------------ runs


class Run:
    """One run, as its directory was when the object was made; make a new object to see later changes.

    A directory that cannot be read as a run does not raise: its status is `damaged`, and `problem` gives the reason.

    path: the run directory.
    status: running, completed, interrupted, failed, diverged, crashed or damaged.
    problem: what cannot be read; None if everything can.

    >>> run: Run = runs.find("baseline")
    >>> run.status, run.config.train.max_iters
    ('completed', 20)
    >>> steps, losses = zip(*run.metrics("train/loss"))
    >>> len(losses)
    20
    >>> sorted(name for name in run.summary if "loss" in name)
    ['best_val_loss', 'train/eval_loss', 'val/loss']
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(expand_home(os.fspath(path)))
        self._read = read_run(self.path)
        self.status, self.problem = self._read.status, self._read.problem

    def __repr__(self) -> str:
        return f"<Run {self.id}: {self.status}>"

    def __fspath__(self) -> str:
        """The run directory, so that a Run can be passed wherever a path of a run is accepted."""
        return os.fspath(self.path)

    def _repr_html_(self) -> str:
        """For notebooks: the output of `experiments.py show`, and the curves."""
        from utils.experiments.tables import show_screen
        from utils.terminal.notebook import html_of, picture_html

        return html_of(show_screen(self._read, (), ())) + picture_html(self.path / CURVES, self.path)

    @property
    def id(self) -> str:
        """The name of the run directory."""
        return self._read.id

    @property
    def tag(self) -> str | None:
        return self._read.record.get("tag")

    @property
    def note(self) -> str:
        return str(self._read.notes["note"])

    @property
    def config(self) -> Config:
        """The configuration that the run was started with: `train(run.config, seed=2)` repeats it with another seed.

        Raises:
            UserError: the configuration is missing or damaged.
        """
        return ConfigLoader(PROJECT_ROOT).load_only(self.path / CONFIG).config

    @property
    def summary(self) -> dict[str, float]:
        """Steps done, last losses, and best val/loss with its step, in nats per token and bits per byte, if known."""
        return self._read.summary()

    def metrics(self, name: str) -> list[tuple[int, float]]:
        """(step, value) of one metric, in the order of the log; empty if nothing is logged yet.

        Raises:
            UserError: the log has other metrics, but not this one.
        """
        found = read_metrics(self.path / LOGS, name)
        if not found and (logged := self.metric_names()):
            raise UserError(f"{self.id} has logged no metric {name}{nearest(name, logged)}")
        return found

    def metric_names(self) -> list[str]:
        """The metrics in the log, in the order of their first appearance."""
        records = read_records(self.path / METRICS_LOG)
        return list(dict.fromkeys(name for record in records for name in record if name not in NOT_METRICS))

    def row(self) -> dict[str, Any]:
        """All facts and settings by column name; `pandas.DataFrame(run.row() for run in runs())` is a table of runs."""
        return self._read.row()


RunName: TypeAlias = str | Path | Run


class RunTable(list[Run]):
    """A list of runs, which a notebook shows as the table of `experiments.py list`.

    >>> table: RunTable = runs()
    >>> "baseline" in [run.tag for run in table]
    True
    """

    def _repr_html_(self) -> str:
        from utils.experiments.tables import columns_of, list_table
        from utils.terminal.notebook import WIDTH, html_of

        if not self:
            return html_of(["no runs"])
        found = [run._read for run in self]
        return html_of([list_table(found, columns_of(found), WIDTH)])


class _Runs:
    """The runs of the configured folder: `runs()` lists them, `runs.find(name)` finds one.

    >>> newest = runs()[-1]
    >>> newest.status
    'completed'
    >>> [run.id for run in runs() if run.summary.get("val/loss", 99) < 0]
    []
    >>> runs.find("baseline").tag
    'baseline'
    """

    def __call__(self, runs_dir: str | Path | None = None) -> RunTable:
        """All runs, the newest last. Directories that cannot be read as a run come first.

        Args:
            runs_dir: the folder of the runs; None: as configured.

        Raises:
            UserError: the folder cannot be read.
        """
        return RunTable(Run(entry.path) for entry in read_index(_runs_dir(runs_dir)))

    def find(self, name: str | Path, runs_dir: str | Path | None = None) -> Run:
        """The run of this path, id, tag (the newest run that has it), NAME@vN, unique part of an id, or `latest`.

        Raises:
            UserError: there is no such run, or a part of an id matches several.
        """
        return Run(resolve_run(os.fspath(name), _runs_dir(runs_dir)))


runs = _Runs()


def _runs_dir(runs_dir: str | Path | None = None) -> Path:
    configured = ConfigLoader(PROJECT_ROOT).load().config.tracking.runs_dir if runs_dir is None else os.fspath(runs_dir)
    return PROJECT_ROOT / expand_home(configured)


class Comparison:
    """Which runs are better, and whether the difference is more than noise; made by `compare`.

    metric: the metric that was compared.
    data: groups of runs, verdicts, and values at equal steps, tokens and time, as `experiments.py compare --json`
        prints them.

    >>> others = [train(max_iters=20, seed=seed, learning_rate=0.01, run_tag="fast", quiet=True) for seed in (1, 2)]
    >>> comparison: Comparison = compare("baseline", "fast")
    >>> comparison.metric, [len(group["runs"]) for group in comparison.data["groups"]]
    ('val/loss', [1, 2])
    """

    def __init__(self, found: Any) -> None:
        from utils.terminal.commands import as_plain

        self._found, self.metric = found, str(found.metric)
        self.data: dict[str, Any] = as_plain(found)

    def __str__(self) -> str:
        from utils.terminal.notebook import text_of

        return text_of(self._screen())

    def __repr__(self) -> str:
        return f"<Comparison of {self.metric}: {len(self.data['groups'])} groups>"

    def _repr_html_(self) -> str:
        from utils.terminal.notebook import html_of

        return html_of(self._screen())

    def _screen(self) -> Iterable[RenderableType]:
        from utils.experiments.comparison_tables import comparison_screen

        return comparison_screen(self._found)


def compare(*names: RunName, metric: str | None = None, runs_dir: str | Path | None = None) -> Comparison:
    """Compare runs, grouping those that differ only in their seed (docs/comparing.md). A tag stands for all its runs.

    Args:
        metric: the name of a metric in the log; None: val/loss, or bits per byte if the tokenizers differ.
        runs_dir: the folder of the runs; None: as configured.

    Raises:
        UserError: there is no such run, or fewer than two runs have logged the metric.

    >>> other = train(max_iters=20, learning_rate=0.02, run_tag="faster", quiet=True)
    >>> print(compare("baseline", "faster"))
    val/loss at the end
    ...
    """
    from utils.experiments.compare import compare as compare_runs

    found = []
    for name in names:
        paths = [name.path] if isinstance(name, Run) else resolve_runs(os.fspath(name), _runs_dir(runs_dir))
        found += [read_run(Path(os.path.abspath(path))) for path in paths]
    return Comparison(compare_runs(found, metric))


# ------------------------------------------------------------------------------------------------ models


def create_model(
    config: Settings | ModelConfig | None = None, *, vocab_size: int | None = None, **settings: Any
) -> TrainableModel:
    """Create a model on the CPU, with the weights that training with these settings would start from.

    Args:
        config: a ModelConfig, a Config, or settings by name, flat or by section.
        vocab_size: the size V of the vocabulary; None: that of the configured corpus, which is then read.
        settings: settings by name, which override `config`.

    Raises:
        UserError: there is a mistake in the settings, or the corpus cannot be read.

    >>> model = create_model(n_layer=2, n_embd=32, vocab_size=65)
    >>> model.num_parameters() == get_model_info(model)["parameters"]
    True
    >>> results = create_model(n_layer=1, max_iters=20).fit("to be or not to be\\n" * 100, quiet=True)
    >>> results.status
    'completed'
    """
    import torch

    loaded = _load(Config(model=config) if isinstance(config, ModelConfig) else config, settings)
    tokenizer = None
    if vocab_size is None:
        from data import load_corpus
        from utils.corpora.absolute_paths import with_absolute_paths
        from utils.preparation.arithmetic import with_problems

        placed = with_absolute_paths(loaded, PROJECT_ROOT).config
        data, block_size = placed.data, placed.model.block_size
        folder, datasets_dir = PROJECT_ROOT / data.corpora_dir, PROJECT_ROOT / data.datasets_dir
        data = with_problems(placed, folder)
        tokenizer = load_corpus(data, block_size, folder, datasets_dir=datasets_dir).tokenizer
        vocab_size = tokenizer.vocab_size
    elif vocab_size < 1:
        raise UserError(f"vocab_size must be at least 1, not {vocab_size}")
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(loaded.config.train.seed)  # leaves the generators of GPUs alone
        model = _import_late("TrainableModel")(loaded.config.model, vocab_size)
    model.tokenizer, model._loaded = tokenizer, loaded
    return cast("TrainableModel", model)


class _Fit:
    """A LanguageModel with a method `fit` that trains it; made by `create_model`.

    >>> model: TrainableModel = create_model(n_layer=1, max_iters=20)
    >>> model.fit("to be or not to be\\n" * 100, quiet=True).steps
    20
    >>> Generator(model.eval(), model.tokenizer).generate("to ").text != ""
    True
    """

    tokenizer: Tokenizer | None = None
    _loaded: LoadedConfig | None = None  # the settings that `create_model` was given

    def fit(self, data: Settings | str | Path | None = None, *, quiet: bool = False, **settings: Any) -> TrainResult:
        """Train this architecture in a new run, then take over its weights and tokenizer.

        As in other libraries, training starts from the initial weights of the configured seed, even at a second call.
        A run that does not complete leaves the model unchanged; `resume(results.run_dir)` continues the run.

        Args:
            data: a text of several lines; the name of a corpus; the path of a text file or a folder of them; or a
                whole configuration, as for `train`. None: the settings that the model was made with.
            quiet: print only warnings.
            settings: settings by name, which override those that the model was made with.

        Raises:
            UserError: there is a mistake in the settings, a setting would change the architecture, or the layers of
                the model were changed by hand.
            Exception: the failure that ended the run.
        """
        from utils.inference.export import load_export

        model = cast("TrainableModel", self)
        base = model._loaded or LoadedConfig.from_config(Config(model=model.config))
        if isinstance(data, str | Path):
            settings["dataset"], data = _dataset(data, base.config), None
        loaded = _load(data, settings, base)
        _check_architecture(model, loaded.config.model)
        results = _train(loaded, quiet=quiet)
        if results.status == "completed":
            device = next(model.parameters()).device
            export = load_export(results.run_dir / EXPORT, device)
            vars(model).update(vars(export.model), tokenizer=export.tokenizer)
        return results


def _check_architecture(model: TrainableModel, config: ModelConfig) -> None:
    """Raises UserError unless `model` has the architecture that training with `config` would create."""
    from model import outline

    differing = [key for key, value in model.config if getattr(config, key) != value]
    if differing:
        raise UserError(f"the model has another {', '.join(differing)}: make a new one with create_model")
    plain = outline(config, model.vocab_size)
    kinds, own = ([(name, type(part)) for name, part in m.named_modules() if name] for m in (plain, model))
    if kinds != own:
        raise UserError("the layers of the model were changed by hand: fit trains what the configuration describes")


def _dataset(data: str | Path, config: Config) -> str:
    """The setting `dataset` for the data given to `fit`; a text is written to a file in the folder of the corpora."""
    if not (isinstance(data, str) and "\n" in data):
        return os.fspath(data)
    text = data.encode("utf-8", errors="replace")
    path = PROJECT_ROOT / config.data.corpora_dir / "texts" / f"{hashlib.sha256(text).hexdigest()[:16]}.txt"
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomic(path, text)
    return str(path)


def load_model(run: RunName | None = None, device: str = "auto") -> tuple[LanguageModel, Tokenizer]:
    """Load the trained model of a run, in eval mode, and its tokenizer.

    On a CPU, the weights are mapped from the file into memory; training them does not change the file.

    Args:
        run: a path, id, tag, part of an id, `latest`, a Run, or an export folder; None: the newest run with an export.
        device: auto, cpu, cuda, cuda:N or mps.

    Raises:
        UserError: there is no such run, export or device, or the export is damaged.

    >>> model, tokenizer = load_model("baseline", device="cpu")
    >>> import torch
    >>> logits, _ = model(torch.tensor([tokenizer.encode("The ")]))  # (B, T) -> (B, T, V)
    >>> logits.shape == (1, 4, tokenizer.vocab_size)
    True
    """
    from utils.inference.export import load_export
    from utils.machine.device import choose_device

    export = load_export(_export_folder(run), choose_device(device))
    return export.model, export.tokenizer


def load_pretrained(
    name: str,
    *,
    local_dir: str | Path | None = None,
    revision: str | None = None,
    device: str = "auto",
    dtype: str = "auto",
    context: int = 4096,
) -> tuple[LanguageModel, Tokenizer]:
    """Load a published model in eval mode, and its tokenizer: GPT-2, Llama, Mistral, Qwen and similar architectures.

    The model is looked for in a folder, then in the cache of the Hugging Face hub, then on the hub; see
    docs/pretrained.md. A line on stderr says where it was found, and another names unused keys of its config.json.
    Each tensor goes from its file straight to the device, so no memory is needed besides the model's. To generate text:
    `Generator(*load_pretrained("gpt2")).generate("The ")`.

    Args:
        name: a folder, or NAME or ORGANISATION/NAME of the hub.
        local_dir: a folder that has the model, or that it is downloaded into.
        revision: a branch, tag or commit.
        device: auto, cpu, cuda, cuda:N or mps.
        dtype: precision of the weights: float32, bfloat16 or float16; auto: bfloat16 on a GPU with hardware support
            for it, otherwise float32.
        context: the largest number of tokens that the model attends to, unless it supports fewer.

    Raises:
        UserError: there is no such model, device or dtype, or the model is damaged or not supported.

    >>> try:
    ...     load_pretrained("./models/none")
    ... except UserError as error:
    ...     print(error)
    ./models/none: no folder with a config.json, and not a name of the hub (NAME or ORGANISATION/NAME)
    """
    import torch

    from utils.formats.hub import find_pretrained
    from utils.formats.pretrained import open_pretrained
    from utils.inference.quantization import choose_weights
    from utils.machine.device import choose_device

    dtypes = ("auto", "float32", "bfloat16", "float16")
    if dtype not in dtypes:
        raise UserError(f"dtype must be {', '.join(dtypes)}, not {dtype}{nearest(dtype, dtypes)}")
    if context < 1:
        raise UserError(f"context must be at least 1, not {context}")
    chosen = choose_device(device)
    folder = None if local_dir is None else Path(expand_home(os.fspath(local_dir)))
    found = find_pretrained(name.removeprefix("hf:"), local_dir=folder, revision=revision, report=_note)
    opened = open_pretrained(found.folder)
    tokenizer = opened.tokenizer()
    _note(f"{name}: {found.where}")
    if opened.unknown:
        _note(f"{name}: keys of config.json that are not used: {', '.join(opened.unknown)}")
    precision = choose_weights("auto", chosen) if dtype == "auto" else dtype
    return opened.load(chosen, getattr(torch, precision), context), tokenizer


def _note(line: str) -> None:
    print(printable(f"note: {line}"), file=sys.stderr)


def _export_folder(run: RunName | None) -> Path:
    return find_export(None if run is None else os.fspath(run), _runs_dir())


def get_model_info(model: LanguageModel | RunName | None = None) -> dict[str, Any]:
    """Describe a model.

    Args:
        model: a model, or a run as for `load_model`.

    Returns:
        architecture: a description in words.
        parameters: the number of parameters; a tied output head counts once.
        layers, heads, width, context, vocab_size: the most important sizes.
        config: all settings of the architecture.
        shapes: the shape of each parameter by name.
        training: for a run, the facts that its export records: run, step, losses, corpus; otherwise empty.

    Raises:
        UserError: as for `load_model`.

    >>> info = get_model_info("baseline")
    >>> info["layers"], info["shapes"]["token_embedding.weight"] == (info["vocab_size"], info["width"])
    (1, True)
    >>> info["training"]["step"]
    20
    """
    from model import LanguageModel
    from utils.inference.export import load_export
    from utils.inference.info import architecture
    from utils.machine.device import choose_device

    training: Mapping[str, Any] = {}
    if not isinstance(model, LanguageModel):
        export = load_export(_export_folder(model), choose_device("cpu"))
        model, training = export.model, export.training
    return {
        "architecture": architecture(model.config),
        "parameters": model.num_parameters(),
        "layers": model.config.n_layer,
        "heads": model.config.n_head,
        "width": model.config.n_embd,
        "context": model.config.block_size,
        "vocab_size": model.vocab_size,
        "config": model.config.model_dump(),
        "shapes": {name: tuple(parameter.shape) for name, parameter in model.named_parameters()},
        "training": dict(training),
    }


# ------------------------------------------------------------------------------------------------ late imports

if TYPE_CHECKING:

    class TrainableModel(_Fit, LanguageModel):  # created at run time by `_import_late`
        __doc__ = _Fit.__doc__


@functools.cache
def _import_late(name: str) -> Any:
    """Import, or for TrainableModel create, a name of this module that needs torch."""
    if name == "TrainableModel":
        from model import LanguageModel

        return type(name, (_Fit, LanguageModel), {"__doc__": _Fit.__doc__, "__module__": __name__})
    return getattr(importlib.import_module(IMPORTED_LATER[name]), name)


def __getattr__(name: str) -> Any:
    if name != "TrainableModel" and name not in IMPORTED_LATER:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}{nearest(name, __all__)}")
    tune_process()  # before torch is imported
    globals()[name] = found = _import_late(name)
    return found
