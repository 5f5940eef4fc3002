"""The flags of inference.py, besides the settings of section `inference`."""

from __future__ import annotations

import argparse

from utils.terminal.cli import place, whole

COUNT = whole(1, 1_000_000)  # of sequences or tokens


def one_character(text: str) -> str:
    """The `type` of an argparse flag that takes one character."""
    if len(text) != 1:
        raise argparse.ArgumentTypeError(f"expected one character, got {text!r}")
    return text


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add all flags except the settings of section `inference`."""
    parser.add_argument(
        "runs",
        metavar="RUN",
        nargs="*",
        help="path, id, tag, part of an id, or latest (default: the newest with an export); several RUNs: side by side",
    )
    parser.add_argument(
        "--device", default="auto", metavar="NAME", help="auto, cpu, cuda, cuda:N or mps (default: auto)"
    )
    parser.add_argument(
        "--unknown-token",
        type=one_character,
        metavar="C",
        help="read characters that are not in the vocabulary as C, which is (default: as in training)",
    )
    parser.add_argument("--runs-dir", type=place, metavar="DIR", help="folder of the runs (default: as configured)")
    weights = parser.add_mutually_exclusive_group()
    weights.add_argument(
        "--weights",
        choices=("auto", "float32", "bfloat16"),
        default="auto",
        help="precision of the weights and activations; auto: bfloat16 on a GPU with bfloat16 units, otherwise "
        "float32, and always float32 with --score (default: auto)",
    )
    weights.add_argument("--quantize", choices=("int8",), help="8-bit matrices with a scale per row, on a CPU")
    add_mode_arguments(parser.add_argument_group("what to do (one of these)").add_mutually_exclusive_group())
    add_output_arguments(parser.add_argument_group("prompts and output"))
    add_draft_arguments(parser.add_argument_group("speculative decoding"))
    add_sampling_arguments(parser.add_argument_group("sampling, besides the settings of section inference"))


def add_mode_arguments(group: argparse._MutuallyExclusiveGroup) -> None:
    group.add_argument(
        "--prompt", default="", metavar="TEXT", help="text to continue; empty: start from a line break (default: empty)"
    )
    group.add_argument(
        "--prompt-file",
        type=place,
        metavar="FILE",
        help='one prompt a line, or .jsonl with {"prompt": ...} in each line; empty lines are skipped',
    )
    group.add_argument("--interactive", action="store_true", help="a conversation; /help lists its commands")
    group.add_argument(
        "--score", type=place, metavar="FILE", help="loss, perplexity and bits per byte of a text; nothing is generated"
    )
    group.add_argument(
        "--show-info", action="store_true", help="parameters, vocabulary, training data and origin of the run"
    )


def add_output_arguments(group: argparse._ArgumentGroup) -> None:
    group.add_argument(
        "--mode",
        choices=("text", "qa"),
        default="text",
        help="qa: put each prompt, a question, into qa_template, and end the answer at qa_stop (default: text)",
    )
    group.add_argument(
        "--samples", type=COUNT, default=1, metavar="N", help="completions for each prompt, each with the next seed"
    )
    group.add_argument(
        "--batch-size", type=COUNT, metavar="N", help="sequences generated together (default: 16, or 1 with a draft)"
    )
    group.add_argument(
        "--out", type=place, metavar="FILE", help="JSONL with the completions of --prompt-file (default: stdout)"
    )
    group.add_argument("--json", action="store_true", help="print a line of JSON for each completion, score or RUN")
    group.add_argument("--stats", action="store_true", help="print the speed of generation on stderr afterwards")
    group.add_argument("--html", type=place, metavar="FILE", help="write a page that shows several RUNs side by side")
    group.add_argument("--logprobs", action="store_true", help="with several RUNs, list each token's log-probability")


def add_draft_arguments(group: argparse._ArgumentGroup) -> None:
    group.add_argument(
        "--draft",
        metavar="RUN",
        help="generate faster, from the same distribution: this run of a smaller model proposes tokens, and the model "
        "judges several in one pass; ngram: propose what followed the last few tokens earlier in the text",
    )
    group.add_argument(
        "--draft-tokens", type=COUNT, default=5, metavar="N", help="tokens to propose at a time (default: 5)"
    )


def add_sampling_arguments(group: argparse._ArgumentGroup) -> None:
    group.add_argument("--seed", type=int, default=1337, metavar="N", help="seed of the sampling (default: 1337)")
    group.add_argument(
        "--ban",
        action="append",
        default=[],
        metavar="TEXT",
        help=r"never draw a token of TEXT; \n is a line break (repeatable)",
    )
    group.add_argument(
        "--stop",
        action="append",
        default=[],
        metavar="TEXT",
        help=r"end the completion before TEXT; \n is a line break (repeatable)",
    )
    group.add_argument(
        "--window",
        choices=("sliding", "exact"),
        default="sliding",
        help="past the context, sliding: continue from the cached tokens (with learned positions, recompute the newer "
        "half when the context is full); exact: recompute the whole window for each token (default: sliding)",
    )
