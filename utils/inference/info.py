"""Facts about an export: parameters by module, architecture, vocabulary and origin."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from rich.console import Group, RenderableType
from rich.text import Text

from model import LanguageModel
from tokenizer import Tokenizer
from utils.config.settings import ModelConfig
from utils.errors import number_text
from utils.folders import size_of
from utils.inference.export import Export
from utils.runs.index import IndexedRun, read_run
from utils.runs.layout import RECORD
from utils.runs.metrics import decode_number
from utils.terminal.tables import plain_table, title
from utils.terminal.words import column_text, counted, fact_lines, printable, size, time_text

SHOWN_TOKENS = 64
NAMES = {"token_embedding": "token embedding, head", "position_embedding": "positions", "ngram_embedding": "n-grams"}
VISIBLE = {" ": "␣", "\n": "⏎", "\t": "⇥"}
PARAMETER = re.compile(r"(?:blocks\.(?P<block>\d+)\.)?(?P<module>.+?)(?:\.tables\.\d+)?\.(?:weight|bias)")


@dataclass
class ModuleSummary:
    """A module, or the modules of that name in all blocks together.

    shapes: shapes of the parameters in one block.
    """

    name: str
    blocks: int = 0
    parameters: int = 0
    shapes: list[tuple[int, ...]] = field(default_factory=list)


def summarize_modules(model: LanguageModel) -> list[ModuleSummary]:
    """The modules that have parameters, in the order of the forward pass; a tied head is the token embedding."""
    parts: dict[str, ModuleSummary] = {}
    for name, parameter in model.named_parameters():
        found = PARAMETER.fullmatch(name)
        module, block = (found["module"], found["block"]) if found else (name, None)  # a custom module
        part = parts.setdefault(
            module, ModuleSummary(_name(module, model.config), 0 if block is None else model.config.n_layer)
        )
        part.parameters += parameter.numel()
        if block in (None, "0"):
            part.shapes.append(tuple(parameter.shape))
    return list(parts.values())


def _name(module: str, config: ModelConfig) -> str:
    if module == "token_embedding" and not config.tie_embeddings:
        return "token embedding"
    return NAMES.get(module, module.replace("_", " ").replace(".", " "))


def architecture(config: ModelConfig) -> str:
    """The architecture in one line."""
    heads = f"{config.n_head} heads of {config.head_width}"
    if config.kv_heads != config.n_head:
        heads += f" on {config.kv_heads} key/value heads"
    theta = f"rope (theta {number_text(config.rope_theta)})" if config.position == "rope" else "learned positions"
    if config.rope_scaling != "none":
        theta += f" scaled by {number_text(config.rope_factor)} ({config.rope_scaling})"
    window = f"window of {config.sliding_window:,} tokens" if config.sliding_window is not None else ""
    if window and config.full_attention_layers:
        window += f" from block {config.full_attention_layers}"
    words = [
        counted(config.n_layer, "block"),
        f"width {config.n_embd}",
        heads,
        f"MLP {config.ffn_width} {config.mlp}",
        config.norm,
        theta,
        f"n-gram tables of {', '.join(f'{rows:,}' for rows in config.ngram_rows)} rows" if config.ngram_rows else "",
        window,
        ("learned " if config.qk_norm_weights else "") + "query/key norm" if config.qk_norm else "",
        "biases" if config.bias else "q, k, v biases" if config.has_qkv_bias else "no biases",
        "tied head" if config.tie_embeddings else "untied head",
        f"logits capped at {number_text(config.logit_softcap)}" if config.logit_softcap is not None else "",
    ]
    return ", ".join(word for word in words if word)


def vocabulary(tokenizer: Tokenizer) -> str:
    """Size, kind and first tokens of the vocabulary; white space and unprintable characters are made visible."""
    first = "".join(_visible(tokenizer.decode([token])) for token in range(min(SHOWN_TOKENS, tokenizer.vocab_size)))
    more = " ..." if tokenizer.vocab_size > SHOWN_TOKENS else ""
    special = [f"{name} {_visible(tokenizer.decode([token]))}" for name, token in tokenizer.special_tokens.items()]
    return f"{tokenizer.vocab_size:,} tokens ({tokenizer.kind}): {first}{more}{'; '.join(['', *special])}"


def _visible(text: str) -> str:
    return "".join(VISIBLE.get(character) or printable(character) for character in text)


def info_screen(export: Export, folder: Path) -> list[RenderableType]:
    """One export on one screen.

    Args:
        folder: folder of the export; in a run directory the screen also shows facts from run.json.
    """
    config, training, run = export.model.config, export.training, _run_of(folder)
    name = column_text("run", training.get("run"))
    rows = [
        ("architecture", architecture(config)),
        ("context", f"{config.block_size:,} tokens"),
        ("vocabulary", vocabulary(export.tokenizer)),
        ("trained on", _corpus(training)),
        ("weights", _weights(training)),
        *_origin(run),
        ("export", f"{folder}, {size(size_of(folder))}"),
    ]
    return [
        Text(name or str(folder), style="bold"),
        fact_lines([row for row in rows if row[1]]),
        "",
        _table(export.model),
    ]


def info_data(export: Export, folder: Path) -> dict[str, Any]:
    """The facts of `info_screen` for JSON. run: facts and settings of the run; None if the export is not in one."""
    run = _run_of(folder)
    return {
        "export": folder,
        "bytes": size_of(folder),
        "model": export.model.config.model_dump(mode="json"),
        "tokenizer": {"kind": export.tokenizer.kind, "vocab_size": export.tokenizer.vocab_size},
        "parameters": export.model.num_parameters(),
        "modules": [asdict(module) for module in summarize_modules(export.model)],
        "training": dict(export.training),
        "run": run.row() if run.readable else None,
        "problem": run.problem,
    }


def _run_of(folder: Path) -> IndexedRun:
    """The run whose directory contains the export."""
    run = Path(os.path.abspath(folder)).parent.parent
    return read_run(run) if (run / RECORD).is_file() else IndexedRun(run)


def _corpus(training: Mapping[str, Any]) -> str:
    name, sha256 = (column_text(key, training.get(key)) for key in ("dataset", "corpus_hash"))
    return name + (f", sha256 {sha256}" if sha256 else "")


def _weights(training: Mapping[str, Any]) -> str:
    """Which weights these are: "best, of step 1,500, val/loss 1.4233"."""
    words = [
        column_text("weights", training.get("weights")),
        f"of step {column_text('steps', training['step'])}" if "step" in training else "",
        *(
            f"{name} {decode_number(training[name]):.4f}"
            for name in ("val/loss", "train/eval_loss")
            if name in training
        ),
    ]
    return ", ".join(word for word in words if word)


def _origin(run: IndexedRun) -> list[tuple[str, str]]:
    """Facts from run.json, or the problem with it."""
    if not run.readable:
        return [("problem", run.problem or "")]
    row = run.row()
    best = column_text("val_loss", row["val_loss"])
    steps = row["steps"]
    return [
        ("best val/loss", best + (f" at step {row['best_step']:,}" if best and row["best_step"] is not None else "")),
        ("run", run.id + f", {run.status}" + (f" after {steps:,} steps" if steps else "")),
        ("tag", column_text("tag", row["tag"])),
        ("started", time_text(row["start"]) if row["start"] else ""),
        ("git commit", column_text("commit", row["commit"]) + (" with uncommitted changes" if row["dirty"] else "")),
        ("note", column_text("note", row["note"])),
    ]


def _table(model: LanguageModel) -> RenderableType:
    """The table of parameters by module."""
    total = model.num_parameters()
    table = plain_table([""], ["parameters", "share"])
    table.add_column("shapes")
    for part in summarize_modules(model):
        shapes = " + ".join(" x ".join(f"{length:,}" for length in shape) for shape in part.shapes)
        shapes = f"{part.blocks} x ({shapes})" if part.blocks else shapes
        share = f"{part.parameters / total:.1%}"
        table.add_row(Text(part.name, style="cyan"), f"{part.parameters:,}", share, Text(shapes, style="dim"))
    table.add_row(Text("total", style="bold"), Text(f"{total:,}", style="bold"), "100.0%", "")
    return Group(title("Parameters"), table)
