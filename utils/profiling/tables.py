"""A profile as tables for the terminal, and two profiles side by side."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from utils.profiling.record import MATRIX_PRODUCTS, NO_OPERATOR, OTHER_OPERATORS, Profile
from utils.terminal.tables import plain_table
from utils.terminal.words import counted, fact_lines, setting_text

BAR_WIDTH = 20  # characters for 100%
MEMORY_CATEGORIES = ("weights", "gradients", "optimizer", "activations")
NAME_WIDTH = 27  # of an operator, so that the table fits into 80 columns
NOTHING = 0.005  # GB/s; slower operators work on single numbers
OTHERS = "others"  # the operators that are not shown by name


@dataclass
class OperatorTotal:
    """An operator, summed over all phases; numbers are per step."""

    kind: str
    calls: float = 0.0
    ms: float = 0.0
    gflop: float = 0.0
    gbyte: float = 0.0


def operators_by_name(profile: Profile) -> dict[str, OperatorTotal]:
    """The operators by name, the longest first."""
    found: dict[str, OperatorTotal] = {}
    for row in profile.operators:
        operator = found.setdefault(row.name, OperatorTotal(row.kind))
        operator.kind = row.kind if row.kind != OTHER_OPERATORS else operator.kind
        operator.calls += row.calls
        operator.ms += row.ms
        operator.gflop += row.gflop
        operator.gbyte += row.gbyte
    return dict(sorted(found.items(), key=lambda item: -item[1].ms))


# --------------------------------------------------------------------------------------------- one profile


def profile_tables(profile: Profile, top: int) -> list[RenderableType]:
    """Facts, phases, kinds of work, operators, memory, generation.

    Args:
        top: number of operators shown by name.
    """
    parts = [head(profile), phase_table(profile), work_table(profile), operator_table(profile, top)]
    parts.append(memory_table(profile))
    if profile.generation:
        parts.append(generation_table(profile))
    return [item for part in parts for item in (part, "")][:-1]


def head(profile: Profile) -> RenderableType:
    machine, limits = profile.machine, profile.limits
    train, model = profile.config["train"], profile.config["model"]
    compiled = ", compiled" if machine.compile else ""
    undisturbed = " (median, undisturbed)" if profile.step_ms is not None else ""
    rows = [
        ("device", f"{machine.device}, {machine.dtype}, {counted(machine.threads, 'CPU thread')}{compiled}"),
        ("model", f"{profile.parameters:,} parameters, {profile.gflop:,.2f} GFLOP a step"),
        ("batch", f"{train['batch_size']} x {model['block_size']} tokens"),
        ("step", f"{profile.best_ms:.2f} ms{undisturbed}, {profile.tokens_per_second:,.0f} tokens/s"),
    ]
    if (of_ranks := profile.communication) is not None:
        lanes = "no lanes" if of_ranks.lanes is None else f"{of_ranks.lanes} lanes"
        sent = f"each sends {of_ranks.sent_bytes / 1e6:,.3g} MB a step; the numbers below are of rank 0"
        rows.insert(2, ("ranks", f"{of_ranks.world_size} ({of_ranks.backend}), {lanes}: {sent}"))
    if profile.run is not None:
        rows.insert(0, ("run", f"{profile.run}, step {profile.step:,}"))
    if limits is not None:
        best = ", ".join(f"{rate(value)} GFLOP/s in {name}" for name, value in limits.gemm.items())
        rows.append(("limits", f"matrix product {best}; copy {rate(limits.copy_gbytes)} GB/s"))
        rows.append(("use", f"{rate(profile.gflops)} GFLOP/s, {percent(profile.mfu)} of the matrix product (MFU)"))
    return fact_lines(rows)


def phase_table(profile: Profile) -> RenderableType:
    table = _table("phase", "share", "", "calls", "ms", "GFLOP", "GFLOP/s", "of limit")
    for row in profile.phases:
        share = row.ms / profile.phases_ms
        table.add_row(
            row.name,
            percent(share),
            bar(share),
            f"{row.calls:,.0f}",
            f"{row.ms:.3f}",
            *(
                (
                    f"{row.gflop:,.2f}",
                    rate(1000 * row.gflop / row.ms),
                    share_of(1000 * row.gflop / row.ms, profile.gemm),
                )
                if row.gflop and row.ms
                else ()
            ),
        )
    table.add_section()
    total = 1000 * profile.gflop / profile.phases_ms
    table.add_row(
        *("sum", "100.0%", "", "", f"{profile.phases_ms:.3f}", f"{sum(row.gflop for row in profile.phases):,.2f}"),
        *(rate(total), share_of(total, profile.gemm)),
        style="dim",
    )
    notes = []
    if profile.step_ms is not None:
        notes.append("Means of other steps, with a wait for the device after each phase.")
        if profile.config["train"].get("cuda_graph") and profile.machine.device.startswith("cuda"):
            notes.append("Their kernels are launched one by one; the undisturbed step is a CUDA graph if it can be.")
    return _titled("Phases of a step", table, *notes)


def work_table(profile: Profile) -> RenderableType:
    """The kinds of work in a step, and the time that its matrix products alone would need."""
    if not profile.operator_times:
        return Text(f"On {profile.machine.device} the profiler sees only launches, not the work itself.", style="dim")
    table = _table("what", "share", "", "ms")
    for name, ms in profile.operators_ms.items():
        if ms or name == MATRIX_PRODUCTS:
            share = ms / profile.profiled_ms
            table.add_row(name, percent(share), bar(share), f"{ms:.3f}")
    notes = [f"Under the profiler, again of other steps: a step takes {profile.profiled_ms:.2f} ms there."]
    if profile.gemm is not None:
        least = 1000 * profile.gflop / profile.gemm
        notes.append(f"At the limit the model's matrix products, with attention, would take {least:.2f} ms.")
    return _titled("Where the time goes", table, *notes)


def operator_table(profile: Profile, top: int) -> RenderableType:
    table = _table("operator", "share", "calls", "ms", "GFLOP/s", "GB/s", "of limit")
    found = operators_by_name(profile)
    rest = OperatorTotal(OTHER_OPERATORS)
    for index, (name, row) in enumerate(found.items()):
        if index < top:
            table.add_row(*_operator_cells(name, row, profile))
        else:
            rest.calls, rest.ms = rest.calls + row.calls, rest.ms + row.ms
    if rest.calls:
        table.add_row(*_operator_cells(f"{len(found) - top} {OTHERS}", rest, profile), style="dim")
    if not profile.operator_times:
        return _titled("Operators, by the time of their launch", table)
    note = "GB/s is estimated from shapes. Limit: the matrix product, or else the copy; above 100%: from a cache."
    return _titled("Operators", table, note)


def _operator_cells(name: str, row: OperatorTotal, profile: Profile) -> list[RenderableType]:
    share = row.ms / profile.profiled_ms
    cells: list[RenderableType] = [_cropped(name), percent(share), f"{row.calls:,.0f}", f"{row.ms:.3f}"]
    if not (profile.operator_times and row.ms):
        return cells
    flops, moved = 1000 * row.gflop / row.ms, 1000 * row.gbyte / row.ms
    if not flops and moved < NOTHING:
        return cells
    copy = profile.limits.copy_gbytes if profile.limits else None
    used = share_of(flops, profile.gemm) if flops else share_of(moved, copy)
    return [*cells, rate(flops) if flops else "", rate(moved), used]


def memory_table(profile: Profile) -> RenderableType:
    """The categories, their sum, and the peak."""
    memory = profile.memory
    sizes = {name: getattr(memory, name) for name in MEMORY_CATEGORIES}
    total = sum(size or 0 for size in sizes.values())
    table = _table("what", "share", "", "MB")
    for name, size in sizes.items():
        if size is None:
            table.add_row(name, "", "", "not measured")
        else:
            table.add_row(name, percent(size / total), bar(size / total), megabytes(size))
    table.add_section()
    table.add_row("sum", "100.0%", "", megabytes(total), style="dim")
    if memory.peak is None:
        return _titled("Memory", table)
    if profile.machine.device.startswith("cuda"):
        table.add_row("most at once", "", "", megabytes(memory.peak))
        return _titled("Memory", table)
    table.add_row("growth of the process", "", "", megabytes(memory.peak))
    return _titled("Memory", table, "The process grows by more than these: by libraries and their buffers, too.")


def generation_table(profile: Profile) -> RenderableType:
    g = profile.generation
    assert g is not None
    table = _table("one sequence", "tokens/s", "ms", "GFLOP/s", "GB/s", "of limit")
    flops, moved = 1000 * g.prefill_gflop / g.prefill_ms, 1000 * g.decode_gbyte / g.decode_ms
    gemm, copy = (profile.limits.gemm[g.dtype], profile.limits.copy_gbytes) if profile.limits else (None, None)
    speeds = f"{g.prefill_tokens_per_second:,.0f}", f"{g.decode_tokens_per_second:,.0f}"
    table.add_row(
        f"prefill of {g.prompt} tokens", speeds[0], f"{g.prefill_ms:.3f}", rate(flops), "", share_of(flops, gemm)
    )
    table.add_row("decode, a token", speeds[1], f"{g.decode_ms:.3f}", "", rate(moved), share_of(moved, copy))
    note = "Prefill is limited by matrix products, decode by reading weights and cache."
    return _titled(f"Generation in {g.dtype}", table, note)


# --------------------------------------------------------------------------------------------- two profiles


def comparison_tables(a: Profile, b: Profile, names: Sequence[str], top: int) -> list[RenderableType]:
    """A and B side by side: their differences in settings and machine, then totals, phases and operators.

    Args:
        names: how the user named A and B.
        top: number of operators shown: those that differ most.
    """
    phases_a, phases_b = ({row.name: row.ms for row in profile.phases} for profile in (a, b))
    operators_a, operators_b = (
        {**{name: row.ms for name, row in operators_by_name(p).items()}, NO_OPERATOR: p.operators_ms[NO_OPERATOR]}
        for p in (a, b)
    )
    parts: list[RenderableType] = [
        fact_lines([("A", names[0]), ("B", names[1])]),
        difference_table(a, b),
        _pairs("Totals", summary(a), summary(b)),
        _pairs("Phases (ms)", phases_a, phases_b),
        _pairs("Operators, the largest differences (ms)", operators_a, operators_b, top),
    ]
    return [item for part in parts for item in (part, "")][:-1]


def summary(profile: Profile) -> dict[str, float | None]:
    """The numbers of a profile that are compared first."""
    memory, generation, limits = profile.memory, profile.generation, profile.limits
    return {
        "step (ms)": profile.best_ms,
        "tokens/s": profile.tokens_per_second,
        "GFLOP a step": profile.gflop,
        "GFLOP/s": profile.gflops,
        "MFU (%)": None if profile.mfu is None else 100 * profile.mfu,
        "limit: matrix product (GFLOP/s)": profile.gemm,
        "limit: copy (GB/s)": None if limits is None else limits.copy_gbytes,
        **{f"{name} (MB)": _in_mb(getattr(memory, name)) for name in MEMORY_CATEGORIES},
        "most in a step (MB)": _in_mb(memory.peak),
        "prefill (tokens/s)": None if generation is None else generation.prefill_tokens_per_second,
        "decode (tokens/s)": None if generation is None else generation.decode_tokens_per_second,
    }


def difference_table(a: Profile, b: Profile) -> RenderableType:
    """The settings and the facts about the machine that differ."""
    ours, theirs = _conditions(a), _conditions(b)
    differing = [key for key in {**ours, **theirs} if ours.get(key) != theirs.get(key)]
    if not differing:
        return Text("Settings and machine are the same.", style="dim")
    table = plain_table(["", "A", "B"])
    for key in differing:
        table.add_row(
            Text(key, style="cyan"), *(Text(setting_text(values.get(key)) or "none") for values in (ours, theirs))
        )
    return _titled("What differs", table)


def _conditions(profile: Profile) -> dict[str, Any]:
    """Settings and facts about the machine; a fact replaces the setting of the same name."""
    settings = {key: value for section in profile.config.values() for key, value in section.items()}
    machine = profile.machine.model_dump()
    return {**machine, **settings, **machine}


def _pairs(
    title: str, a: Mapping[str, float | None], b: Mapping[str, float | None], top: int | None = None
) -> RenderableType:
    """One row for each number that A or B has; at most `top` rows, those that differ most."""
    table = _table("", "A", "B", "B - A", "B / A")

    def difference(name: str) -> float:
        return abs((a.get(name) or 0.0) - (b.get(name) or 0.0))

    names: Iterable[str] = [name for name in {**a, **b} if a.get(name) is not None or b.get(name) is not None]
    if top is not None:
        names = sorted(names, key=difference, reverse=True)[:top]
    for name in names:
        left, right = a.get(name), b.get(name)
        both = left is not None and right is not None
        table.add_row(
            _cropped(name) if top is not None else name,
            _number(left),
            _number(right),
            _number(right - left, "+") if left is not None and right is not None else "",
            f"{right / left:.2f}" if both and left else "",  # type: ignore[operator]
        )
    return _titled(title, table)


# ------------------------------------------------------------------------------------------------- numbers


def _table(*headers: str) -> Table:
    """A column of names, then one for each header; a column without a header holds bars."""
    table = plain_table()
    table.add_column(headers[0], style="cyan", no_wrap=True, overflow="ellipsis")
    for header in headers[1:]:
        if header:
            table.add_column(header, justify="right", no_wrap=True)
        else:
            table.add_column("", style="magenta", no_wrap=True, overflow="crop")
    return table


def _titled(title: str, table: Table, *notes: str) -> Group:
    return Group(Text(title, style="bold"), table, *(Text(note, style="dim") for note in notes))


def _cropped(name: str) -> str:
    return name if len(name) <= NAME_WIDTH else f"{name[: NAME_WIDTH - 1]}…"


def bar(share: float) -> Text:
    return Text("█" * round(BAR_WIDTH * min(1.0, share)))


def percent(share: float | None) -> str:
    return "" if share is None else f"{100 * share:.1f}%"


def rate(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.1f}" if value >= 1 else f"{value:.2f}"


def share_of(value: float, limit: float | None) -> str:
    return f"{100 * value / limit:.0f}%" if limit else ""


def megabytes(size: int) -> str:
    return f"{size / 1e6:,.1f}"


def _in_mb(size: int | None) -> float | None:
    return None if size is None else size / 1e6


def _number(value: float | None, sign: str = "") -> str:
    if value is None:
        return "-"
    if abs(value) >= 1000:
        return f"{value:{sign},.0f}"
    return f"{value:{sign}.3f}" if abs(value) < 100 else f"{value:{sign}.1f}"
