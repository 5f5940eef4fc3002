"""The learning-rate range test [Smith 2017, Cyclical Learning Rates for Training Neural Networks, section 3.3].

Starting from the initial weights, the learning rate grows by a constant factor from step to step. The loss falls while
the rate is useful; it stops falling, becomes ragged or rises near the largest rate that converges. The suggestion is
half of that rate, since the best rate is usually within a factor of two of the largest that converges [Bengio 2012,
Practical recommendations for gradient-based training of deep architectures; cited by Smith].
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

import numpy as np
from rich.console import RenderableType

from utils.config.loader import flag_name
from utils.errors import UserError
from utils.files import json_text, write_output
from utils.optim.schedules import set_learning_rate
from utils.terminal.console import Terminal, is_coloured
from utils.terminal.pictures import new_figure, picture_of
from utils.terminal.words import fact_lines
from utils.training.lanes import LaneUpdate
from utils.training.state import TrainState
from utils.training.step import EagerUpdate, no_phase

DIVERGED = 1.1  # times the first loss: the loss has diverged
WINDOW = 0.1  # share of the steps through which a straight line is fitted, for the loss and its slope at one step
LEAST_FALL = 0.02  # of the first loss: a smaller fall does not count
LEAST_STEPS = 20
RULE = "half of the rate where the smoothed loss stops falling"
COLORS = {
    "raw": "#b8c4d6",
    "smoothed": "#3b6fb6",
    "falls fastest": "#2f9e63",
    "suggestion": "#d1495b",
    "stops falling": "#8a8f98",
}
TERMINAL_COLORS = (250, 33)  # of 256: the loss of each step, smoothed


@dataclass(frozen=True)
class LrRange:
    """The outcome of a range test.

    rates, losses, smoothed: the learning rate, loss and smoothed loss (nats per token) of each step with a finite loss.
    diverged_at: the rate at which the loss diverged, which ended the test; None: it ran to its end.
    steepest: the rate at which the smoothed loss fell fastest from step to step.
    edge: the rate at which the smoothed loss stopped falling.
    suggestion: a peak learning rate; None: `problem` says why there is none.
    """

    rates: list[float]
    losses: list[float]
    smoothed: list[float]
    diverged_at: float | None
    steepest: float
    edge: float
    suggestion: float | None
    problem: str | None
    own_rates: dict[str, float] = field(default_factory=dict)  # rates of groups over learning_rate; all rise together


def lr_range_test(state: TrainState, low: float, high: float, steps: int) -> LrRange:
    """Train `state` with learning rates from `low` to `high` for at most `steps` updates.

    Raises:
        UserError: the loss diverges within the first few steps.
    """
    state.model.train()
    update = EagerUpdate(state) if state.config.train.lanes is None else LaneUpdate(state)

    def step(lr: float) -> float:
        set_learning_rate(state.optimizer, lr)
        loss, grad_norms = update.gradients(no_phase)
        update.apply(grad_norms)
        return loss.item()

    rates, losses, diverged_at = rising_rates(step, low, high, steps)
    optimizer = state.config.optimizer
    own = {key: getattr(optimizer, key) for key in ("embedding_lr", "head_lr", "vector_lr")}
    shares = {key: rate / optimizer.learning_rate for key, rate in own.items() if rate is not None}
    return replace(analyse(rates, losses, diverged_at, steps), own_rates=shares)


def rising_rates(
    step: Callable[[float], float], low: float, high: float, steps: int
) -> tuple[list[float], list[float], float | None]:
    """The rates and losses of up to `steps` updates, and the rate at which the loss diverged, if it did.

    Args:
        step: makes one update with the given rate and returns the loss before it.
    """
    rates: list[float] = []
    losses: list[float] = []
    for number in range(steps):
        rate = low * (high / low) ** (number / (steps - 1))
        loss = step(rate)
        if not math.isfinite(loss):
            return rates, losses, rate
        rates.append(rate)
        losses.append(loss)
        if np.mean(losses[-_window(steps) // 2 :]) > DIVERGED * losses[0]:
            return rates, losses, rate
    return rates, losses, None


def _window(steps: int) -> int:
    """The width of the smoothing window: an odd number of steps."""
    return max(5, 2 * round(WINDOW * steps / 2) + 1)


def analyse(rates: list[float], losses: list[float], diverged_at: float | None, steps: int) -> LrRange:
    """Find the rate at which the smoothed loss stops falling.

    Raises:
        UserError: there are too few losses.
    """
    from scipy.signal import savgol_filter

    width = _window(steps)
    if len(losses) < width:
        raise UserError(f"the loss diverged within {len(losses) + 1} steps: --lr-min must be lower")
    smoothed = savgol_filter(losses, width, polyorder=1)
    slopes = savgol_filter(losses, width, polyorder=1, deriv=1)
    edge, problem = _edge(smoothed, slopes), None
    if smoothed[edge] > losses[0] * (1 - LEAST_FALL):
        problem = "the loss has not fallen: other bounds (--lr-min, --lr-max) or more --lr-steps may show more"
    elif diverged_at is None and edge >= len(losses) - width // 2:  # too few steps are left to see a rise
        problem = "the loss was still falling at the end: --lr-max must be higher"
    return LrRange(
        rates=rates,
        losses=losses,
        smoothed=[float(loss) for loss in smoothed],
        diverged_at=diverged_at,
        steepest=rates[int(np.argmin(slopes[: edge + 1]))],
        edge=rates[edge],
        suggestion=None if problem else float(f"{rates[edge] / 2:.2g}"),
        problem=problem,
    )


def _edge(smoothed: np.ndarray, slopes: np.ndarray) -> int:
    """The step at which the loss stops falling, after at least half of its fall; the last step if it never stops."""
    half = int(np.argmax(smoothed <= (smoothed[0] + smoothed.min()) / 2))
    rising = np.flatnonzero(slopes[half:] >= 0)
    return half + int(rising[0]) if len(rising) else len(slopes) - 1


# ------------------------------------------------------------------------------------------ output


def report(result: LrRange, terminal: Terminal) -> None:
    """Print the curve, unless the terminal is quiet, and the table of results."""
    console = terminal.console
    if not terminal.quiet:
        print(
            terminal_plot(result, min(console.width, 110), max(14, min(console.height - 12, 24)), is_coloured(console))
        )
    terminal.print("", table(result))


def table(result: LrRange) -> RenderableType:
    at = dict(zip(result.rates, result.smoothed, strict=True))
    rows = [
        ("first loss", f"{result.losses[0]:.4f}"),
        ("falls fastest", f"at {result.steepest:.1e} ({at[result.steepest]:.4f})"),
        ("stops falling", f"at {result.edge:.1e} ({at[result.edge]:.4f})"),
        ("diverges", f"at {result.diverged_at:.1e}" if result.diverged_at else f"not up to {result.rates[-1]:.1e}"),
    ]
    if result.suggestion is None:
        return fact_lines([*rows, ("suggestion", f"none: {result.problem}")])
    rates = {"learning_rate": 1.0} | result.own_rates
    flags = " ".join(f"{flag_name(key)} {result.suggestion * share:.2g}" for key, share in rates.items())
    return fact_lines([*rows, ("suggestion", f"{flags}, {RULE}")])


def _limits(result: LrRange) -> tuple[float, float]:
    """The lowest and highest loss that a picture shows, without a diverging loss, which would dwarf the others."""
    before = result.smoothed[: result.rates.index(result.edge) + 1]
    low, high = min(result.losses), max(result.losses[0], *before)
    return low - 0.05 * (high - low), high + 0.1 * (high - low)


def terminal_plot(result: LrRange, width: int, height: int, colour: bool) -> str:
    """Plot the losses over the logarithm of the rate, as text of at most `width` columns.

    Args:
        colour: False: no control sequences, and only the smoothed losses, since two curves would look the same.
    """
    import plotext

    figure = plotext.figure
    plotext.terminal.limit(False, False)  # use the caller's size, whatever the size of the terminal
    figure.clear()
    plotext.add_theme("lr_range", sequence=TERMINAL_COLORS if colour else TERMINAL_COLORS[1:])
    figure.theme("lr_range")
    figure.plot_size(width, height - 1)
    logarithms = [math.log10(rate) for rate in result.rates]
    low, high = _limits(result)
    for losses in [result.losses, result.smoothed] if colour else [result.smoothed]:
        shown = [min(loss, high) for loss in losses]
        figure.draw(figure.signal(logarithms, shown, marker="braille").lines())
    decades = list(range(math.ceil(logarithms[0] - 1e-9), math.floor(logarithms[-1] + 1e-9) + 1))
    figure.ruler("x").ticks(decades, [f"1e{power}" for power in decades])
    figure.ruler("x").lim(logarithms[0], logarithms[-1])
    figure.ruler("y").lim(low, high)
    figure.label("learning rate", axis="x")
    lines = figure.build().string(colorless=not colour).rstrip("\n").split("\n")
    figure.clear()
    return "\n".join(["loss (nats per token)", *(line.rstrip() for line in lines)])


def save(result: LrRange, folder: Path) -> list[Path]:
    """Write lr_range.json and lr_range.png into `folder`; return their paths.

    Raises:
        OSError: they cannot be written.
    """
    facts_file, picture = folder / "lr_range.json", folder / "lr_range.png"
    write_output(facts_file, json_text({**asdict(result), "rule": RULE}))
    write_output(picture, draw(result))
    return [facts_file, picture]


def draw(result: LrRange) -> bytes:
    """Draw the result, as a PNG file."""
    with new_figure(8, 4.5, dpi=120) as figure:
        axes = figure.add_subplot()
        axes.semilogx(result.rates, result.losses, color=COLORS["raw"], linewidth=1, label="loss of each step")
        axes.semilogx(result.rates, result.smoothed, color=COLORS["smoothed"], linewidth=1.6, label="smoothed")
        marks = {"falls fastest": result.steepest, "suggestion": result.suggestion, "stops falling": result.edge}
        for name, rate in marks.items():
            if rate is not None:
                axes.axvline(rate, color=COLORS[name], linestyle="--", linewidth=1.2, label=f"{name}: {rate:.2g}")
        axes.set(xlabel="learning rate", ylabel="loss (nats per token)", ylim=_limits(result))
        axes.grid(alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)
        axes.legend()
        return picture_of(figure)
