"""The model card of an export: what it was trained on and how, its losses, its licence, and how to load it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from utils.errors import number_text
from utils.formats.source import Source
from utils.inference.info import architecture
from utils.runs.metrics import decode_number
from utils.terminal.words import printable, setting_text

SETTINGS = (
    *("batch_size", "block_size", "optimizer_name", "learning_rate"),
    *("schedule", "weight_decay", "dropout", "seed"),
)
MADE_HERE = "A language model trained with the research workbench."
NO_LICENCE = (
    "None is stated. What may be done with the weights depends on the texts they were trained on{base}; choose a "
    "licence before you publish them."
)


def model_card(source: Source, library: str, loading: str, licence: str | None, notes: list[str]) -> str:
    """The README.md of an export: Markdown, with the front matter that the hub reads.

    Args:
        library: the program that loads the export, by its name on the hub.
        loading: code that loads it.
        licence: of the weights; None for that of the model that training started from, if it states one.
        notes: what a reader must know about this export.
    """
    base = source.pretrained.get("name")
    licence = licence or source.pretrained.get("license")
    front = {
        "library_name": library,
        "pipeline_tag": "text-generation",
        "license": licence,
        "base_model": base if source.pretrained.get("published") else None,
    }
    config, count = source.model.config, source.model.num_parameters()
    facts = {
        "Architecture": architecture(config),
        "Parameters": f"{count:,}",
        "Context": f"{config.block_size:,} tokens",
        "Vocabulary": f"{source.tokenizer.vocab_size:,} tokens ({source.tokenizer.kind})",
        "Started from": _base_words(source.pretrained),
        **_training_facts(source),
    }
    lines = ["---", *(f"{key}: {_yaml(value)}" for key, value in front.items() if value), "---", ""]
    lines += [f"# {source.name}", "", MADE_HERE, ""]
    lines += ["| | |", "|---|---|", *(f"| {key} | {_cell(value)} |" for key, value in facts.items() if value), ""]
    lines += [
        "## How to load it",
        "",
        "The path below is that of this folder.",
        "",
        "```python",
        loading.strip(),
        "```",
        "",
    ]
    if notes:
        lines += [*(f"- {note}" for note in notes), ""]
    lines += ["## Licence", "", licence or NO_LICENCE.format(base=f" and on the licence of {base}" if base else ""), ""]
    return "\n".join(lines)


def _training_facts(source: Source) -> dict[str, str]:
    training, record = source.training, source.record
    resolved, git = record.get("resolved") or {}, record.get("git") or {}
    facts = {"Run": str(training.get("run", "")), "Step": _number(training.get("step"))}
    for name, words in (("val/loss", "Validation loss"), ("train/eval_loss", "Training loss")):
        if name in training:
            facts[words] = f"{decode_number(training[name]):.4f} nats per token"
    corpus = training.get("corpus") or resolved.get("dataset")
    if corpus:
        tokens = resolved.get("train_tokens")
        facts["Data"] = Path(str(corpus)).name + (f", {tokens:,} training tokens" if isinstance(tokens, int) else "")
    if resolved.get("corpus_hash"):
        facts["Data sha256"] = str(resolved["corpus_hash"])
    flat = {
        key: value
        for section in source.settings.values()
        if isinstance(section, dict)
        for key, value in section.items()
    }
    if flat:
        facts["Settings"] = ", ".join(f"{key} {setting_text(flat[key])}" for key in SETTINGS if key in flat)
    if git.get("commit"):
        facts["Code"] = f"commit {git['commit']}" + (", with uncommitted changes" if git.get("dirty") else "")
    for key, words in (("torch", "torch"), ("processor", "Trained on")):
        if resolved.get(key):
            facts[words] = str(resolved[key])
    return facts


def _base_words(pretrained: Mapping[str, Any]) -> str:
    if not pretrained.get("name"):
        return ""
    revision = f" at revision {pretrained['revision']}" if pretrained.get("revision") else ""
    return f"{pretrained['name']}{revision}"


def _number(value: Any) -> str:
    return f"{value:,}" if isinstance(value, int) else number_text(value) if isinstance(value, float) else ""


def _cell(text: str) -> str:
    return printable(text).replace("|", "\\|")


def _yaml(value: str) -> str:
    """A text as a YAML value, quoted unless it is plain."""
    plain = value.replace("-", "").replace("_", "").replace("/", "").replace(".", "").isalnum()
    return (
        value if plain and value.isascii() else '"' + printable(value).replace("\\", "\\\\").replace('"', '\\"') + '"'
    )
