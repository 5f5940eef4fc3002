"""Every path of a run directory, relative to it. Other modules use these names and never spell a path.

The files inside a checkpoint or an export are named in utils/checkpoints/folder.py, those of a profile in
utils/profiling/record.py: each of these folders is written and read as one thing.
"""

from __future__ import annotations

from pathlib import Path

# What the run is and how it stands.
RECORD = Path("run.json")  # id, status, command, resolved values, results, resumes
NOTES = Path("notes.json")  # tags, note and pin: what people say about the run
LOCK = Path("lock")  # held by the training process for as long as it lives (utils/runs/lock.py)

# Where it came from: written when training starts.
META = Path("meta")
CONFIG = META / "full_config.json"  # every setting, by section
CONFIG_SOURCES = META / "config_sources.json"  # where each setting was set, and what that shadows
GIT = META / "git.txt"  # commit, branch, remote, files left out of the patch
PATCH = META / "code.patch"  # turns the commit into the code that ran; absent where nothing was changed
CALLBACKS = META / "callbacks"  # the source of each callback's module
ENVIRONMENT = META / "env.txt"  # Python, platform, devices, versions of all packages
TOKENIZER = META / "tokenizer.json"
PRETRAINED = META / "pretrained.json"  # of the published model whose weights the run began with
MODEL_SUMMARY = META / "model.json"  # parameters by layer
METRIC_REGISTRY = META / "metrics.json"  # name, unit and direction of each metric in the log


def session_meta(number: int) -> Path:
    """The folder that describes the code and environment of a later session: 2 is the first resume."""
    return META / f"session_{number}"


# What happened: append-only logs, and the views made from them.
LOGS = Path("logs")
METRICS_LOG = LOGS / "metrics.jsonl"
HISTOGRAMS_LOG = LOGS / "histograms.jsonl"
SAMPLES_LOG = LOGS / "samples.jsonl"  # generated texts
TRAIN_LOG = LOGS / "train.log"  # what the terminal showed
WANDB = LOGS / "wandb"


def fed_note(view: str) -> Path:
    """The file that says how much of the logs a view (`aim`, say) has received; `*` makes it a pattern for all."""
    return LOGS / f"fed_{view}.json"


# What it produced.
ARTIFACTS = Path("artifacts")
CHECKPOINTS = ARTIFACTS / "checkpoints"
BASE_WEIGHTS = CHECKPOINTS / "base.safetensors"  # with adapters: the frozen weights, which all checkpoints share
EXPORT = ARTIFACTS / "export"  # the weights for inference, with configuration and tokenizer
ADAPTER = "adapter"  # in an export: the adapters of a run that trained some, in peft's format
PROFILE = ARTIFACTS / "profile"
CURVES = ARTIFACTS / "curves.png"
EVALUATIONS = ARTIFACTS / "evaluations.jsonl"  # what evaluate.py found; only appended to
ARITHMETIC_PICTURE = ARTIFACTS / "arithmetic.png"  # which digits are taken for which
FLIGHT_RECORDER = ARTIFACTS / "flight_recorder.json"  # the last steps before a loss that was not finite
SEAL = ARTIFACTS / "seal.json"  # checksums of meta/, logs/ and the export; the last file of a run

# TensorBoard's event files lie beside run.json: it names a run by the folder of its event files.
OLD_TENSORBOARD = LOGS / "tensorboard"  # where they lie in older runs

# Beside the run directories, in the folder that holds them.
MODELS = Path("models.json")  # promoted runs: NAME -> its versions
GATE = Path("gate.jsonl")  # what was compared by experiments.py gate, with its verdicts; only appended to
INDEX_CACHE = Path(".index.json")  # what was read of runs that have ended; may be deleted (utils/runs/index_cache.py)
