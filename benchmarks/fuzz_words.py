"""Command lines and configuration files that nobody would write on purpose."""

from __future__ import annotations

import json
import os
import random
import string
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import experiments
import weights
from benchmarks.fuzz_damage import BAD, DATASET, GOOD
from utils.config.fields import FIELDS, SECTIONS
from utils.config.loader import flag_name
from utils.inference.flags import add_arguments
from utils.terminal.cli import Parser
from utils.terminal.commands import Command

TRUE_MISTAKE = (2,)
PERHAPS = (0, 2)
ODD = (
    *("", " ", "0", "-1", "1", "2", "0.5", "1e-3", "nan", "-inf", "1e999", "0x10", "0100", "1_000", "१२", "9" * 400),
    *("none", "null", "true", "auto", "latest", "a,b", "1,2", ",", "[1,2]", "{}", "é", "🙂", "\udcff", "a\nb", "\t"),
    *("\x1b[31mred\x1b[0m", "\x9b31m", "x" * 300, "x" * 5000, "%s%n", "{0}", "'; DROP TABLE runs; --", "*", "a:b"),
    *("a@v1", "a:latest", "a:-1", f"{BAD}:best", f"{GOOD}:3", ".", "..", "/", "/dev/null", "--", "-", "--json", "-h"),
    *(
        "pipe",
        "zeros",
        "loop",
        "binary",
        "empty",
        "notes.txt",
        "nowhere/x",
        "notes.txt/x",
        "out",
        "val_loss",
        "step desc",
        "status = 'x'",
        "1 = 1",
        GOOD,
        BAD,
    ),
)
# A valid value of these may cost any amount: minutes, gigabytes, or another machine.
COSTLY = {
    *("n_layer", "n_head", "n_kv_head", "n_embd", "head_dim", "ffn_dim", "block_size", "ngram_sizes", "ngram_tables"),
    *(
        "batch_size",
        "gradient_accumulation_steps",
        "tokens_per_step",
        "max_iters",
        "epochs",
        "stop_at_step",
        "max_minutes",
    ),
    *("eval_iters", "sample_tokens", "max_new_tokens", "checkpoint_interval", "threads", "compile", "compile_mode"),
    *("wandb_mode", "aim_logging", "aim_repo", "closing_seconds", "dataset"),
}
LONG_COMMANDS = ("reproduce", "gate", "noise", "bisect", "ui")  # of experiments.py: they train for minutes or never end
NEVER_VALID = ("", " ", "-1", "nan", "-inf", "x" * 300, "१२x", "a\nb", "\x1b[31m", "{}", "1e999", "\udcff")
PLACES = ("--runs-dir", "--corpora-dir", "--aim-repo", "--dataset")  # always below the folder of the case
RUN_WORDS = (GOOD, BAD, "latest", f"runs/{GOOD}", "", ".", "..", "/", "x", "\udcff", "a\nb", "x" * 5000, f"{BAD}:best")


def misspelled(word: str, rng: random.Random) -> str:
    """A flag with one letter dropped, doubled, changed or moved."""
    place = rng.randrange(2, len(word))
    letter = rng.choice(string.ascii_lowercase)
    return rng.choice(
        (
            word[:place] + word[place + 1 :],
            word[:place] + letter + word[place:],
            word[:place] + letter,
            word[1:],
            word + "x",
        )
    )


def is_quick(key: str) -> bool:
    return key not in COSTLY and flag_name(key) not in PLACES


def odd_setting(rng: random.Random) -> tuple[str, str, Sequence[int]]:
    """A setting with an odd value: (key, value, expected exit statuses)."""
    key = rng.choice(list(FIELDS))
    if is_quick(key):
        return key, rng.choice(ODD), PERHAPS
    return (key, rng.choice(NEVER_VALID), PERHAPS) if key in COSTLY else ("seed", rng.choice(ODD), PERHAPS)


def training_words(rng: random.Random) -> tuple[list[str], Sequence[int]]:
    """Flags to add to those of a tiny training."""
    kind = rng.randrange(6)
    if kind == 0:
        flag = misspelled(flag_name(rng.choice(list(FIELDS))), rng)
        return [flag, "1"], TRUE_MISTAKE if flag[2:].replace("-", "_") not in FIELDS else PERHAPS
    if kind == 1:
        return [rng.choice(("stray", "--n-layer", "--", "-x", "--config", "--fork", "--resume"))], PERHAPS
    if kind == 2:
        flag = rng.choice(("--resume", "--init-from", "--callbacks", "--config", "--config-dir"))
        return [
            flag,
            rng.choice((*ODD, "pipe.yaml", "zeros.json")),
            *rng.choice(((), ("--fork",), ("--strict-resume",), ("--strict",))),
        ], PERHAPS
    if kind == 3:
        return ["--dataset", rng.choice(("out", "pipe", "zeros", "binary", "empty", "loop", "x" * 5000, "", "a\nb"))], (
            2,
        )
    words: list[str] = []
    for _ in range(rng.choice((1, 1, 2))):
        key, value, _statuses = odd_setting(rng)
        words.append(f"{flag_name(key)}={value}")
    return words, PERHAPS


def experiments_words(rng: random.Random) -> tuple[list[str], Sequence[int]]:
    """A command of experiments.py with more or less fitting arguments."""
    return command_words([one for one in experiments.COMMANDS if one.name not in LONG_COMMANDS], rng)


def weights_words(rng: random.Random) -> tuple[list[str], Sequence[int]]:
    """A command of weights.py; none that loads transformers, which takes seconds."""
    words, statuses = command_words([one for one in weights.COMMANDS if one.name not in ("certify", "export")], rng)
    return words, (*statuses, 1) if words[0] == "download" else statuses  # there is no network


def command_words(commands: Sequence[Command], rng: random.Random) -> tuple[list[str], Sequence[int]]:
    """One of the commands of a script, with more or less fitting arguments."""
    declared = rng.choice(commands)
    words = [declared.name]
    for names, options in declared.flags:
        flag = names[-1]
        if not flag.startswith("-"):
            many = options.get("nargs") in ("+", "*")
            words += rng.choices(RUN_WORDS if rng.random() < 0.7 else ODD, k=rng.choice((1, 2, 3)) if many else 1)
        elif rng.random() < 0.4:
            takes_value = options.get("action") not in ("store_true", "append_const") and "Boolean" not in str(
                options.get("action")
            )
            value = f"out/{rng.choice(ODD)[:99].replace('/', '')}" if flag == "--out" else rng.choice(ODD)
            words.append(f"{flag}={value}" if takes_value else flag)
    if rng.random() < 0.1:
        words.insert(rng.randrange(len(words)), rng.choice(("--nothing", "stray", "-h", "--lim")))
    return [word for word in words if word != "--yes"], (0, 1, 2) if declared.name in ("check", "rebuild") else PERHAPS


def inference_words(rng: random.Random) -> tuple[list[str], Sequence[int]]:
    parser = Parser()
    add_arguments(parser)
    words = rng.choices(RUN_WORDS, k=rng.choice((0, 1, 1, 1, 2)), weights=[8] + [1] * (len(RUN_WORDS) - 1))
    names = [action.option_strings[-1] for action in parser._actions if action.option_strings]
    settings = [flag_name(key) for key in SECTIONS["inference"].model_fields if is_quick(key)]
    for flag in rng.sample([*names, *settings], rng.choice((1, 1, 2))):
        if flag not in ("--runs-dir", "--samples", "--batch-size", "--draft-tokens"):
            value = f"out/{rng.choice(ODD)[:99].replace('/', '')}" if flag in ("--out", "--html") else rng.choice(ODD)
            words.append(rng.choice((f"{flag}={value}", f"{flag}={value}", flag, misspelled(flag, rng))))
    return words, PERHAPS


def prepare_words(rng: random.Random) -> tuple[list[str], Sequence[int]]:
    """A preparation, or a question about a dataset."""
    if rng.random() < 0.4:
        return [rng.choice(("list", "show", "verify")), rng.choice((DATASET, DATASET, *ODD))], PERHAPS
    words = [rng.choice(("notes.txt", "notes.txt", "out", *ODD)), f"--out={rng.choice(('new', 'new', *ODD[:40]))}"]
    for key in rng.sample(("tokenizer", "special_tokens", "unknown_token", "val_fraction"), rng.choice((0, 1, 2))):
        words.append(f"{flag_name(key)}={rng.choice(ODD)}")
    flags = ("--field", "--separator", "--clean", "--errors", "--tolerate", "--licence", "--origin", "--workres")
    for flag in rng.sample(flags, rng.choice((0, 1, 2))):
        words.append(rng.choice((f"{flag}={rng.choice(ODD)}", flag, misspelled(flag, rng))))
    return [*words, "--workers=1", *rng.choice(((), ("--dry-run",), ("--replace",)))], PERHAPS


def evaluate_words(rng: random.Random) -> tuple[list[str], Sequence[int]]:
    """An evaluation of the interrupted run: the other one must stay as it is."""
    words = [BAD]
    for flag in rng.sample(("--data", "--stride", "--task", "--picture", "--checkpoint", "--jsom"), rng.choice((1, 2))):
        value = f"out/{rng.choice(ODD)[:99].replace('/', '')}" if flag == "--picture" else rng.choice(ODD)
        words.append(rng.choice((f"{flag}={value}", f"{flag}={value}", flag, misspelled(flag, rng))))
    return words, PERHAPS


def profiling_words(rng: random.Random) -> tuple[list[str], Sequence[int]]:
    """A flag of profile_model.py with a wrong value; never a valid one, because a profile takes seconds."""
    flag = rng.choice(("--steps", "--warmup", "--top", "--batch-sizes", "--lr-min", "--lr-steps", "--stepps"))
    value = rng.choice(("", "-1", "nan", "x", "1e999", "१२x", "\udcff", "a\nb", "x" * 5000))
    return [f"{flag}={value}"], TRUE_MISTAKE


def configuration_file(folder: Path, rng: random.Random) -> Path:
    """Write a file of settings with something odd in it; returns its path."""
    suffix = rng.choice((".yaml", ".yaml", ".json", ".yml", ".toml"))
    path = folder / f"odd{suffix}"
    settings: dict[str, Any] = {}
    for _ in range(rng.choice((1, 2, 3))):
        key, value, _statuses = odd_setting(rng)
        settings[key] = rng.choice(
            (value, value, None, True, [value], {key: value}, -1, 0.5) if is_quick(key) else (value,)
        )
    document: Any = rng.choice((settings, settings, {"train": settings}, {"nonsense": settings}, [settings], None, 7))
    text = json.dumps(document, ensure_ascii=rng.random() < 0.5)
    if suffix != ".json" and rng.random() < 0.6 and isinstance(document, dict):
        text = "".join(f"{key}: {value}\n" for key, value in document.items())
    data = bytearray(text.encode("utf-8", "surrogatepass"))
    if rng.random() < 0.5 and data:
        _spoil(data, rng)
    path.write_bytes(data)
    return path


def _spoil(data: bytearray, rng: random.Random) -> None:
    place = rng.randrange(len(data))
    kind = rng.randrange(5)
    if kind == 0:
        data[place] ^= 1 << rng.randrange(8)
    elif kind == 1:
        del data[place:]
    elif kind == 2:
        data[place:place] = rng.choice(
            (b"\0", b"\xff", b"\t", b"\r", b"\xef\xbb\xbf", b"---\n", b"&a [*a]", b"!!python/none ''")
        )
    elif kind == 3:
        data[place:place] = rng.choice((b"[", b"{", b"- ", b"? ", b"*", b"<<: ")) * rng.choice((1, 50, 5000))
    else:
        data *= 2  # every key twice


def odd_files(folder: Path) -> None:
    """Files that a command line may name."""
    for name in ("pipe", "pipe.yaml"):
        os.mkfifo(folder / name)
    for name in ("zeros", "zeros.json"):
        (folder / name).symlink_to("/dev/zero")
    (folder / "loop").symlink_to("loop")
    (folder / "binary").write_bytes(bytes(range(256)) * 40)
    (folder / "empty").write_bytes(b"")
