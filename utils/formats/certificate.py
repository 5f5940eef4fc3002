"""Certificates of exports: does the program that an export is made for compute the same as this project?

For fixed prompts, token ids, logits and greedy continuations are compared; the result is kept beside the files.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from model import LanguageModel
from tokenizer import Tokenizer
from utils.errors import UserError, is_out_of_memory
from utils.files import read_json, real_path, write_json
from utils.formats.engines import ENGINES, Engine, installed
from utils.formats.gguf import MODEL as GGUF
from utils.formats.gguf import differing_weight, stored_model, stored_type
from utils.formats.onnx_export import MODEL as GRAPH
from utils.formats.pretrained import CONFIG, open_pretrained
from utils.formats.source import Source, open_source
from utils.formats.table import FormatError, places
from utils.inference.evaluation import evaluating
from utils.nn.kv_cache import KVCache
from utils.runs.find import export_checksum
from utils.runs.layout import ARTIFACTS, EXPORT
from utils.runs.run import utc_now
from utils.runs.seal import file_sha256
from utils.tokenization.protocol import TokenizerError

CERTIFICATE = "certificate.json"
FILES = {GGUF: "gguf", GRAPH: "onnx", CONFIG: "hf"}  # by which the format is recognised
NEW_TOKENS = 64
PROMPTS = {
    "words": "The cat sat on the mat, and the dog didn't.",
    "digits": "12 + 345 = 357; 3.14159, 1,000,000 and 0xFF",
    "newlines": "def f(x):\n\n\treturn x\r\n\n  \nf(1)\n",
    "emoji": "🙂 👩‍👩‍👧 🇩🇪 ✓ ☕️",
    "latin": "Größe, naïve café, Łódź, Đà Nẵng",
    "greek and cyrillic": "Γειά σου, κόσμε. Привет, мир!",
    "east asian": "日本語の文章。你好,世界。안녕하세요",
    "right to left, indic and thai": "مرحبا بالعالم שלום עולם नमस्ते दुनिया สวัสดี",
}
TOLERANCE = 1e-4  # of logits, relative to the largest one (at least 1)
# llama.cpp rounds activations to the type of the matrices that they are multiplied with, for Q8_0 to 8 bits, and looks
# up GELU in a table of 16-bit numbers. Weights are compared separately, in `other_weights`.
TOLERANCES_OF_GGUF = {"F32": 3e-3, "F16": 1e-2, "Q8_0": 0.2}


class DisagreementError(RuntimeError):
    """A program computes something else from an export than we do; `lines` say how the results differ."""

    def __init__(self, lines: list[str]) -> None:
        super().__init__("; ".join(lines))
        self.lines = lines


@dataclass(frozen=True)
class Ours:
    """The model and tokenizer that an engine is compared with.

    tolerance: of logits, relative to the largest one (at least 1).
    """

    model: LanguageModel
    tokenizer: Tokenizer
    tolerance: float


def format_of(folder: Path) -> str:
    """The format of an export: hf, gguf or onnx.

    Raises:
        FormatError: the folder is not such an export.
    """
    if export_checksum(folder) is not None:
        raise FormatError(
            f"{folder}: a run's own export, which only this project reads; weights.py export writes the other formats"
        )
    for name, format in FILES.items():
        if (folder / name).is_file():
            return format
    raise FormatError(f"{folder}: not written by weights.py export: it has none of {', '.join(FILES)}")


def source_of(folder: Path, run: str | None, runs_dir: Path) -> Source | None:
    """The run that an export was made from: the named one, or the one whose directory has it; None if neither."""
    if run is not None:
        return open_source(run, runs_dir)
    directory = real_path(folder).parent.parent
    if real_path(folder).parent == directory / ARTIFACTS and (directory / EXPORT).is_dir():
        return open_source(str(directory / EXPORT), runs_dir)
    return None


def certify(folder: Path, source: Source | None) -> dict[str, Any]:
    """Compare an export with ours in the program that it is made for, if installed, and write its certificate.json.

    Args:
        source: what the export was made from, and whose weights it must have. None is allowed for the format hf: then
            the model is read from the folder, and the weights must be those of the existing certificate, if any.

    Raises:
        UserError: the folder is not an export, is damaged, needs its run, or is of a model of another shape.
    """
    format = format_of(folder)
    if source is None and format != "hf":
        raise UserError(f"{folder}: is not in the directory of its run: --run RUN says which one it was made from")
    tokenizer = open_pretrained(folder).tokenizer() if source is None else source.tokenizer
    engine = ENGINES[format]
    version = installed(engine)
    weights = {path.name: file_sha256(path) for path in _weights(folder)}
    certified = weights if source is not None else _certified_weights(folder) or weights
    changed = next((name for name in {**certified, **weights} if weights.get(name) != certified.get(name)), None)
    certificate: dict[str, Any] = {
        "format": format,
        "model": source.name if source is not None else folder.name,
        "time": utc_now(),
        "torch": torch.__version__,
        "weights": certified,
        "tokenizer_sha256": tokenizer.hash(),
        "engines": [],
        "not_installed": {},
        "other_weights": changed if source is None else other_weights(folder, format, source),
    }
    if version is None:
        certificate["not_installed"][engine.name] = f"pip install {engine.install}"
    else:
        ours = _ours(folder, format, source, tokenizer, certificate["other_weights"] is None)
        try:
            opened = engine(folder, ours.model.config.block_size)
        except Exception as error:  # any error of the other program means that it cannot open the export
            if is_out_of_memory(error):
                raise
            reason = f"cannot open the export: {type(error).__name__}: {error}"
            found = {"agrees": False, "differences": [reason], "largest_logit_difference": None, "prompts": []}
        else:
            found = compare(ours, opened)
        certificate["engines"].append({"engine": engine.name, "version": version, **found})
    certificate["agrees"] = None  # nothing was compared
    if certificate["engines"] or certificate["other_weights"] is not None:
        certificate["agrees"] = all(found["agrees"] for found in certificate["engines"])
        certificate["agrees"] &= certificate["other_weights"] is None
    write_json(folder / CERTIFICATE, certificate)
    return certificate


def other_weights(folder: Path, format: str, source: Source) -> str | None:
    """The first tensor of an export that is not the source's, rounded to the type in the export; None if all are.

    An ONNX graph does not keep the tensors by name: only its logits are compared with the source's.
    """
    if format == "onnx":
        return None
    if format == "gguf":
        return differing_weight(source, folder / GGUF, stored_type(folder / GGUF))
    opened, weights = open_pretrained(folder), source.model.state_dict()
    expected = places(opened.family, source.model.config, source.model.vocab_size, filled=True)
    if more := opened.their_names.keys() - {place.theirs for place in expected}:
        return min(more)
    for place in expected:
        if place.theirs not in opened.their_names:
            return place.theirs
        stored = opened.get(place.theirs)
        if stored.shape != place.shape or not torch.equal(place.to_theirs(weights).to(stored.dtype), stored):
            return place.theirs
    return None


def _ours(folder: Path, format: str, source: Source | None, tokenizer: Tokenizer, is_same: bool) -> Ours:
    """What the engine is compared with: the weights in the files, in float32.

    is_same: they are those of the source, rounded to the type in the files.
    """
    if source is None or format == "hf":
        opened = open_pretrained(folder)
        if source is not None and is_same and opened.shards.dtypes == {"F32"}:
            return Ours(source.model, tokenizer, TOLERANCE)
        context = None if source is None else source.model.config.block_size
        model = opened.load(torch.device("cpu"), torch.float32, context)
        return Ours(model, tokenizer, TOLERANCE)
    if format == "onnx":
        return Ours(source.model, tokenizer, TOLERANCE)
    model = stored_model(folder / GGUF, source)
    return Ours(model, tokenizer, TOLERANCES_OF_GGUF[stored_type(folder / GGUF)])


def _certified_weights(folder: Path) -> dict[str, str]:
    """The SHA-256 of each file of weights by the certificate in the folder; empty without a readable certificate."""
    try:
        certified = read_json(folder / CERTIFICATE)["weights"]
        return {str(name): str(digest) for name, digest in certified.items()}
    except (OSError, ValueError, LookupError, TypeError, AttributeError):
        return {}


def _weights(folder: Path) -> list[Path]:
    return sorted(path for path in folder.iterdir() if path.suffix in (".safetensors", ".gguf", ".onnx", ".data"))


def compare(ours: Ours, engine: Engine) -> dict[str, Any]:
    """Run the prompts in an engine and compare its results with ours."""
    prompts, differences = [], []
    largest = tolerance = 0.0
    with evaluating(ours.model):
        for name, text in _prompts(ours.tokenizer):
            found = _compare_prompt(ours, engine, text)
            prompts.append({"name": name, **found})
            differences += [f"{name}: {words}" for words in found.pop("differences")]
            largest, tolerance = max(largest, found["logit_difference"]), max(tolerance, found["tolerance"])
    return {
        "agrees": not differences,
        "differences": differences,
        "largest_logit_difference": largest,
        "tolerance": tolerance,
        "prompts": prompts,
    }


def _prompts(tokenizer: Tokenizer) -> Iterator[tuple[str, str]]:
    """The prompts, without the characters that have no token."""
    for name, text in PROMPTS.items():
        if kept := "".join(character for character in text if _has_token(tokenizer, character)):
            yield name, kept


def _has_token(tokenizer: Tokenizer, character: str) -> bool:
    try:
        return bool(tokenizer.encode(character))
    except TokenizerError:
        return False


def _compare_prompt(ours: Ours, engine: Engine, text: str) -> dict[str, Any]:
    model, differences = ours.model, []
    every = ours.tokenizer.encode(text)
    theirs = engine.encode(text)
    if theirs != every:
        differences.append(f"token ids {_cut(theirs)}, ours {_cut(every)}")
    context = model.config.block_size
    ids = every[: max(1, context // 2)]
    count = min(NEW_TOKENS, context - len(ids) + 1 - engine.spare)
    logits = model(torch.tensor([ids]))[0][0]
    tolerance = ours.tolerance * max(1.0, float(logits.abs().max()))
    ours_there = logits.log_softmax(-1) if engine.normalised else logits
    difference = _largest_difference(engine.logits(ids), ours_there)
    if not difference <= tolerance:
        differences.append(f"logits differ by {difference:.2g}, more than {tolerance:.2g}")
    new, margins = _decode_greedily(model, ids, count)
    their_new = [int(found.argmax()) for found in engine.next_logits(ids, count)]
    first = next((place for place in range(count) if new[place] != their_new[place]), None)
    if first is not None and margins[first] > 2 * tolerance:
        differences.append(f"token {first + 1} that follows is {their_new[first]}, ours {new[first]}")
    return {
        "prompt": text,
        "ids": every,
        "ids_equal": theirs == every,
        "logit_difference": difference,
        "tolerance": tolerance,
        "new_tokens": count,
        "equal_tokens": count if first is None else first,
        "text": ours.tokenizer.decode(new),
        "their_text": ours.tokenizer.decode(their_new),
        "differences": differences,
    }


def _largest_difference(theirs: torch.Tensor, ours: torch.Tensor) -> float:
    """The largest absolute difference of logits (T, V); inf if the shapes differ or one of theirs is not finite.

    -inf in theirs is a logit that the engine does not report; after the last token it must report some.
    """
    given = theirs != -torch.inf
    if theirs.shape != ours.shape or not given[-1].any() or not theirs[given].isfinite().all():
        return float("inf")
    return float((theirs - ours)[given].abs().max())


def _decode_greedily(model: LanguageModel, ids: Sequence[int], count: int) -> tuple[list[int], list[float]]:
    """Decode `count` tokens after ids greedily; also return how far the logit of each is above the next best."""
    weight = model.token_embedding.weight
    cache = KVCache(model.config, 1, model.config.block_size, weight.device, weight.dtype)
    idx = torch.tensor([list(ids)])
    new, margins = [], []
    for _ in range(count):
        logits = model(idx, cache=cache)[0][0, -1]
        best = logits.topk(min(2, len(logits))).values
        new.append(int(logits.argmax()))
        margins.append(float(best[0] - best[-1]))
        idx = torch.tensor([[new[-1]]])
    return new, margins


def _cut(ids: Sequence[int]) -> str:
    return f"{list(ids[:8])}{'...' if len(ids) > 8 else ''}"


def certificate_lines(certificate: Mapping[str, Any]) -> list[str]:
    """A certificate in words: a line for each engine and each difference."""
    lines = []
    if (name := certificate.get("other_weights")) is not None:
        which = f"of {certificate['model']}, which may have been trained since"
        if name in certificate["weights"]:
            which = "that were certified"
        lines.append(f"its weights are not those {which}: {name}")
    for found in certificate["engines"]:
        name = f"{found['engine']} {found['version']}"
        if found["agrees"]:
            equal = sum(prompt["equal_tokens"] for prompt in found["prompts"])
            lines.append(
                f"{name} agrees: the same token ids for {len(found['prompts'])} prompts, logits within "
                f"{found['largest_logit_difference']:.1g}, the same {equal:,} tokens"
            )
        lines += [f"{name} differs: {words}" for words in found["differences"]]
    for name, remedy in certificate["not_installed"].items():
        lines.append(f"not compared with {name}, which is not installed: {remedy}")
    return lines


def check_export(folder: Path, source: Source) -> dict[str, Any]:
    """`certify` for an export that is being written.

    Raises:
        DisagreementError: the export does not agree with the source.
    """
    certificate = certify(folder, source)
    if certificate["agrees"] is False:
        raise DisagreementError(certificate_lines(certificate))
    return certificate
