"""The flags of serve.py, besides the settings of section `inference`."""

from __future__ import annotations

import argparse

from utils.inference.flags import one_character
from utils.terminal.cli import place, whole

MOST_SLOTS, MOST_WAITING = 1024, 100_000


def add_arguments(parser: argparse.ArgumentParser, key_name: str) -> None:
    """Add all flags except the settings of section `inference`.

    Args:
        key_name: the environment variable with the API key.
    """
    parser.add_argument(
        "runs",
        metavar="RUN",
        nargs="*",
        help="path, id, tag, part of an id, or latest (default: the newest with an export); requests use the same name",
    )
    _add_server_arguments(parser.add_argument_group("the server"), key_name)
    _add_model_arguments(parser.add_argument_group("the models"))


def _add_server_arguments(group: argparse._ArgumentGroup, key_name: str) -> None:
    group.add_argument(
        "--host",
        default="127.0.0.1",
        metavar="HOST",
        help="address to listen on; any but loopback lets everyone who can reach this machine use the server, without "
        f"encryption: set {key_name} in its environment to require that key (default: 127.0.0.1)",
    )
    group.add_argument(
        "--port", type=whole(0, 65535), default=8000, metavar="N", help="port; 0: any free one (default: 8000)"
    )
    group.add_argument(
        "--slots",
        type=whole(1, MOST_SLOTS),
        default=16,
        metavar="N",
        help="texts of a run that are generated at once; each takes the memory of a context (default: 16)",
    )
    group.add_argument(
        "--queue",
        type=whole(0, MOST_WAITING),
        default=256,
        metavar="N",
        help="texts of a run that may wait for a slot; more are refused with status 429 (default: 256)",
    )
    group.add_argument("--edit", action="store_true", help="let the pages at /runs change tags and notes of runs")


def _add_model_arguments(group: argparse._ArgumentGroup) -> None:
    group.add_argument("--runs-dir", type=place, metavar="DIR", help="folder of the runs (default: as configured)")
    group.add_argument(
        "--device", default="auto", metavar="NAME", help="auto, cpu, cuda, cuda:N or mps (default: auto)"
    )
    group.add_argument(
        "--unknown-token",
        type=one_character,
        metavar="C",
        help="read characters that are not in the vocabulary as C, which is (default: as in training)",
    )
    weights = group.add_mutually_exclusive_group()
    weights.add_argument(
        "--weights",
        choices=("auto", "float32", "bfloat16"),
        default="auto",
        help="precision of the weights and activations; auto: bfloat16 on a GPU with bfloat16 units, otherwise float32 "
        "(default: auto)",
    )
    weights.add_argument("--quantize", choices=("int8",), help="8-bit matrices with a scale per row, on a CPU")
