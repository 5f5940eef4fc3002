"""The picture of a profile: the step, its phases and operators on one time axis, and rates and memory below."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from utils.files import write_atomic
from utils.profiling.record import ATTENTION, MATRIX_PRODUCTS, NO_OPERATOR, OTHER_OPERATORS, Profile
from utils.profiling.tables import MEMORY_CATEGORIES, megabytes, percent, rate
from utils.terminal.pictures import new_figure, picture_of

if TYPE_CHECKING:
    from matplotlib.axes import Axes

COLORS = {
    MATRIX_PRODUCTS: "#3b6fb6",
    ATTENTION: "#2f9e63",
    OTHER_OPERATORS: "#e0a458",
    NO_OPERATOR: "#e3e6ea",
}
PHASE_COLORS = ("#54627a", "#71809a")  # alternating
STEP_COLOR, TEXT, QUIET = "#2b3446", "#1c2430", "#667080"
MEMORY_COLORS = ("#3b6fb6", "#7fa3d4", "#8a63c4", "#e0a458")
SMALLEST = 0.004  # of a step; shorter operators of the same kind are drawn as one slice
LONGEST_UPRIGHT = 28  # characters of a name written from bottom to top
CHARACTER = 0.0062  # width of a character of a label, as a share of the width of the picture
SIZE = (13, 7.2)  # inches


@dataclass(frozen=True)
class Slice:
    """A rectangle of the icicle chart; left and width are in milliseconds."""

    label: str
    left: float
    width: float
    color: str


def phase_slices(profile: Profile) -> list[Slice]:
    """The phases side by side, each as wide as its time."""
    slices, left = [], 0.0
    for index, phase in enumerate(profile.phases):
        slices.append(Slice(phase.name, left, phase.ms, PHASE_COLORS[index % 2]))
        left += phase.ms
    return slices


def operator_slices(profile: Profile) -> Iterator[Slice]:
    """The operators of each phase, the longest first, then those too short for a slice, then the rest of the phase.

    Their times are those under the profiler, scaled down if they exceed the time of the phase without the profiler.
    """
    least = SMALLEST * profile.phases_ms
    for phase in phase_slices(profile):
        rows = sorted((row for row in profile.operators if row.phase == phase.label), key=lambda row: -row.ms)
        scale = min(1.0, phase.width / total) if (total := sum(row.ms for row in rows)) else 1.0
        left = phase.left
        small = dict.fromkeys(COLORS, 0.0)
        for row in rows:
            if row.ms * scale < least:
                small[row.kind] += row.ms * scale
                continue
            label = "attention" if row.kind == ATTENTION else row.name  # its operators have long names
            yield Slice(label, left, row.ms * scale, COLORS[row.kind])
            left += row.ms * scale
        small[NO_OPERATOR] = phase.left + phase.width - left - sum(small.values())
        for kind, width in small.items():
            if width > 0:
                yield Slice("", left, width, COLORS[kind])
                left += width


def draw_profile(profile: Profile, path: Path) -> None:
    """Write the picture to `path` as PNG.

    Raises:
        OSError: the file cannot be written.
    """
    with new_figure(*SIZE, dpi=120, h_pad=0.12, w_pad=0.12) as figure:
        grid = figure.add_gridspec(3, 2, height_ratios=(0.62, 3.1, 1.55))
        _title(figure.add_subplot(grid[0, :]), profile)
        _icicle(figure.add_subplot(grid[1, :]), profile)
        _rates(figure.add_subplot(grid[2, 0]), profile)
        _memory(figure.add_subplot(grid[2, 1]), profile)
        write_atomic(path, picture_of(figure))


def _title(axes: Axes, profile: Profile) -> None:
    machine, model, train = profile.machine, profile.config["model"], profile.config["train"]
    use = f"  ·  {percent(profile.mfu)} of the machine's matrix product (MFU)" if profile.mfu is not None else ""
    title = f"{profile.best_ms:.1f} ms a step  ·  {profile.tokens_per_second:,.0f} tokens/s{use}"
    axes.text(0, 0.95, title, size=17, weight="bold", color=TEXT, va="top")
    of = f"{profile.run}, step {profile.step:,}  ·  " if profile.run is not None else ""
    facts = (
        f"{of}{profile.parameters:,} parameters  ·  {model['n_layer']} layers, n_embd {model['n_embd']}  ·  "
        f"{train['batch_size']} x {model['block_size']} tokens  ·  {machine.processor}, {machine.dtype}"
        f"{', compiled' if machine.compile else ''}"
    )
    axes.text(0, 0.05, facts, size=10.5, color=QUIET, va="bottom", parse_math=False)
    axes.axis("off")


def _icicle(axes: Axes, profile: Profile) -> None:
    """An icicle chart: time runs from left to right, and each slice is divided in the row below it."""
    from matplotlib.patches import Patch

    total = profile.phases_ms
    rows = (
        [Slice("step", 0.0, total, STEP_COLOR)],
        phase_slices(profile),
        list(operator_slices(profile)),
    )
    for depth, (slices, height) in enumerate(zip(rows, (0.45, 0.6, 1.7), strict=True)):
        top = (0.0, 0.45, 1.05)[depth]
        axes.barh(
            [top] * len(slices),
            [part.width for part in slices],
            left=[part.left for part in slices],
            height=height,
            align="edge",
            color=[part.color for part in slices],
            edgecolor="white",
            linewidth=0.8,
        )
        for part in slices:
            _label(axes, part, part.width / total, top + height / 2, upright=depth == 2)
    axes.set(xlim=(0, total), ylim=(2.75, 0), yticks=[], xlabel="milliseconds")
    axes.spines[["top", "right", "left"]].set_visible(False)
    if profile.operator_times:
        handles = [Patch(color=color, label=kind) for kind, color in COLORS.items()]
        axes.legend(
            handles=handles,
            loc="lower right",
            bbox_to_anchor=(1, 1),
            ncols=len(handles),
            frameon=False,
            fontsize=9.5,
            handlelength=1,
            borderaxespad=0.2,
        )


def _label(axes: Axes, part: Slice, share: float, y: float, upright: bool) -> None:
    """Draw the name and the time if they fit; otherwise the name, turned upright in a narrow slice of an operator."""
    dark = part.color in (COLORS[OTHER_OPERATORS], COLORS[NO_OPERATOR])
    longer = f"{part.label}\n{part.width:.2f} ms" if upright else f"{part.label}  {part.width:.2f} ms"
    room = share / CHARACTER
    texts = [(longer, 0), (part.label, 0), *([(part.label, 90)] if upright else [])]
    for text, rotation in texts:
        fits = room >= 2.2 if rotation else room >= max(map(len, text.split("\n"))) + 1
        if part.label and fits and (not rotation or len(text) <= LONGEST_UPRIGHT):
            x, color = part.left + part.width / 2, TEXT if dark else "white"
            axes.text(x, y, text, rotation=rotation, ha="center", va="center", size=9, color=color, parse_math=False)
            return


def _rates(axes: Axes, profile: Profile) -> None:
    """The rates that were reached, as shares of the machine's limits."""
    limits = profile.limits
    if limits is None or profile.gemm is None:
        axes.axis("off")
        return
    rows = [("step", profile.gflops, profile.gemm, "GFLOP/s")]
    for phase in profile.phases:
        if phase.name in ("forward", "backward"):
            rows.append((phase.name, 1000 * phase.gflop / phase.ms, profile.gemm, "GFLOP/s"))
    if (g := profile.generation) is not None:
        rows.append(("prefill", 1000 * g.prefill_gflop / g.prefill_ms, limits.gemm[g.dtype], "GFLOP/s"))
        rows.append(("decode", 1000 * g.decode_gbyte / g.decode_ms, limits.copy_gbytes, "GB/s"))
    names, shares = [name for name, *_ in rows], [100 * value / limit for _, value, limit, _ in rows]
    axes.barh(names, [100] * len(rows), color="#eef0f3", height=0.66)
    colors = [COLORS[MATRIX_PRODUCTS] if unit == "GFLOP/s" else COLORS[OTHER_OPERATORS] for *_, unit in rows]
    axes.barh(names, [min(100, share) for share in shares], color=colors, height=0.66)
    for index, (_, value, _, unit) in enumerate(rows):
        axes.text(102, index, f"{rate(value)} {unit}, {shares[index]:.0f}%", va="center", size=9.5, color=TEXT)
    best = f"matrix product {rate(profile.gemm)} GFLOP/s, copy {rate(limits.copy_gbytes)} GB/s"
    axes.set_title(f"Share of the limits measured here: {best}", loc="left", size=10.5, color=TEXT)
    axes.set(xlim=(0, 140), xticks=[])
    axes.invert_yaxis()
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)


def _memory(axes: Axes, profile: Profile) -> None:
    """The categories of memory as one bar, with their sizes in the legend."""
    sizes = [(name, getattr(profile.memory, name) or 0) for name in MEMORY_CATEGORIES]
    total, left = sum(size for _, size in sizes), 0.0
    for (name, size), color in zip(sizes, MEMORY_COLORS, strict=True):
        label = f"{name}  {megabytes(size)} MB" if size else f"{name}  not measured"
        axes.barh([0], [size], left=left, color=color, edgecolor="white", height=0.5, label=label)
        left += size
    axes.set_title(f"Memory of training: {megabytes(total)} MB", loc="left", size=10.5, color=TEXT)
    axes.set(xlim=(0, total), ylim=(-1.1, 0.4), xticks=[], yticks=[])
    axes.spines[:].set_visible(False)
    axes.legend(
        loc="upper left",
        bbox_to_anchor=(0, 0.52),
        ncols=2,
        frameon=False,
        fontsize=9.5,
        handlelength=1,
        borderaxespad=0,
    )
