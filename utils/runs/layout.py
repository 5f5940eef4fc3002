"""Every path in a run directory, relative to it. Other modules use these names and never spell out a path.

The files inside a checkpoint or an export are named in utils/checkpoints/folder.py, and those of a profile in
utils/profiling/record.py, since each of these folders is written and read as a whole.
"""

from __future__ import annotations

from pathlib import Path

# What the run is, and its state.
RECORD = Path("run.json")  # id, status, command, resolved values, results, resumes
NOTES = Path("notes.json")  # tags, note and pin, set by people
LOCK = Path("lock")  # held by the training process as long as it lives (utils/runs/lock.py)

# Where it came from: written when training starts.
META = Path("meta")
CONFIG = META / "full_config.json"  # every setting, by section
CONFIG_SOURCES = META / "config_sources.json"  # where each setting was set, and the values that it overrides
GIT = META / "git.txt"  # commit, branch, remote, files left out of the patch
PATCH = META / "code.patch"  # turns the commit into the code that ran; absent if nothing was changed
CALLBACKS = META / "callbacks"  # the source of each callback's module
ENVIRONMENT = META / "env.txt"  # Python, platform, devices, versions of all packages
TOKENIZER = META / "tokenizer.json"
PRETRAINED = META / "pretrained.json"  # facts about the published model whose weights the run began with
MODEL_SUMMARY = META / "model.json"  # parameters by layer
METRIC_REGISTRY = META / "metrics.json"  # name, unit and direction of each metric in the log


def session_meta(number: int) -> Path:
    """The folder for the code and environment of a later session; number 2 is the first resume."""
    return META / f"session_{number}"


# What happened: append-only logs, and the views fed from them.
LOGS = Path("logs")
METRICS_LOG = LOGS / "metrics.jsonl"
HISTOGRAMS_LOG = LOGS / "histograms.jsonl"
SAMPLES_LOG = LOGS / "samples.jsonl"  # generated texts
TRAIN_LOG = LOGS / "train.log"  # what the terminal showed
WANDB = LOGS / "wandb"


def fed_note(view: str) -> Path:
    """The file that records how much of the logs a view, such as `aim`, has received; `*` gives a pattern for all."""
    return LOGS / f"fed_{view}.json"


# What it produced.
ARTIFACTS = Path("artifacts")
CHECKPOINTS = ARTIFACTS / "checkpoints"
BASE_WEIGHTS = CHECKPOINTS / "base.safetensors"  # with adapters: the frozen weights, which all checkpoints share
EXPORT = ARTIFACTS / "export"  # the weights for inference, with configuration and tokenizer
ADAPTER = "adapter"  # in the export of a run with adapters: the adapters, in peft's format
PROFILE = ARTIFACTS / "profile"
CURVES = ARTIFACTS / "curves.png"
EVALUATIONS = ARTIFACTS / "evaluations.jsonl"  # results of evaluate.py; append-only
ARITHMETIC_PICTURE = ARTIFACTS / "arithmetic.png"  # which digits are mistaken for which
FLIGHT_RECORDER = ARTIFACTS / "flight_recorder.json"  # the last steps before a non-finite loss
SEAL = ARTIFACTS / "seal.json"  # checksums of meta/, logs/ and the export; the last file of a run

# TensorBoard's event files are beside run.json, because TensorBoard names a run by the folder of its event files.
OLD_TENSORBOARD = LOGS / "tensorboard"  # their folder in older runs

# Beside the run directories, in the folder of runs.
MODELS = Path("models.json")  # promoted runs: NAME -> its versions
GATE = Path("gate.jsonl")  # the comparisons of experiments.py gate, with verdicts; append-only
INDEX_CACHE = Path(".index.json")  # cached content of runs that have ended; may be deleted (utils/runs/index_cache.py)
