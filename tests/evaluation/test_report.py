"""The lines below the table of evaluate.py."""

from __future__ import annotations

from utils.evaluation.report import window_lines


def test_windows_that_differ_have_a_line_for_each_run() -> None:
    small, large = {"block_size": 64, "stride": 32}, {"block_size": 1024, "stride": 512}
    assert list(window_lines(["a", "b"], [small, small])) == [
        "each token is predicted once, in windows of 64 tokens, advancing by 32"
    ]
    assert list(window_lines(["a", "b"], [small, large])) == [
        "each token is predicted once, in windows of",
        "  64 tokens, advancing by 32: a",
        "  1,024 tokens, advancing by 512: b",
    ]
