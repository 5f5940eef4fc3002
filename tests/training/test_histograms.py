"""Histograms of tensors, compared with numpy's."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from utils.training import histograms
from utils.training.histograms import BINS, ROW, Histograms, Layout, Memory, bin_tensors


def binned(tensors: Sequence[torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
    layout = Layout([tensor.numel() for tensor in tensors], tensors[0].device)
    return bin_tensors(tensors, layout, Memory(layout.rows + 3, tensors[0].device))


def counts_and_range(values: torch.Tensor) -> tuple[list[int], float, float]:
    (counts,), ((low, high),) = binned([values])
    assert counts.shape == (BINS,)
    assert counts.dtype == torch.int64
    return counts.tolist(), low.item(), high.item()


def test_counts_equal_numpy_where_edges_are_exact() -> None:
    values = torch.randint(0, 4 * BINS + 1, (5000,), generator=torch.Generator().manual_seed(0)) / 4 - 3
    values[:2] = torch.tensor([-3.0, BINS - 3.0])  # bins of width 1
    counts, low, high = counts_and_range(values)
    expected, edges = np.histogram(values.numpy(), BINS)
    assert counts == expected.tolist()
    assert (low, high) == (edges[0], edges[-1])


@pytest.mark.parametrize("scale", [1e-8, 0.02, 1.0, 1e6])
@pytest.mark.parametrize("shift", [0.0, 5.0])
def test_counts_equal_numpy_up_to_rounding_at_the_edges(scale: float, shift: float) -> None:
    values = scale * (shift + torch.randn(100, 100, generator=torch.Generator().manual_seed(1)))
    counts, low, high = counts_and_range(values)
    expected, _ = np.histogram(values.numpy().astype(np.float64), BINS)
    assert sum(counts) == values.numel()
    assert np.abs(np.array(counts) - expected).sum() <= 10  # a value within rounding of an edge may change its bin
    assert (low, high) == (values.min().item(), values.max().item())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_precisions_are_binned_as_float32(dtype: torch.dtype) -> None:
    values = torch.randn(1000, generator=torch.Generator().manual_seed(2)).to(dtype)
    assert counts_and_range(values) == counts_and_range(values.float())


@pytest.mark.parametrize("shape", [(7,), (), (2, 3, 4)])
@pytest.mark.parametrize("value", [0.0, -3.5, 1e-20, 1e20])
def test_a_constant_tensor_is_in_one_bin(shape: tuple[int, ...], value: float) -> None:
    values = torch.full(shape, value)
    counts, low, high = counts_and_range(values)
    assert sorted(counts)[-2:] == [0, values.numel()]
    assert low == high == values.max().item()


def test_the_largest_value_is_in_the_last_bin() -> None:
    counts, _, _ = counts_and_range(torch.tensor([0.0, 1.0, 1.0]))
    assert (counts[0], counts[-1], sum(counts)) == (1, 2, 3)


def test_nonfinite_values_are_counted_separately() -> None:
    values = torch.tensor([0.0, math.nan, 1.0, math.inf, -math.inf, 1.0])
    (record,) = Histograms().records(3, 12.34567, {"params/w": values})
    assert record["nonfinite"] == 3
    assert (record["min"], record["max"]) == (0.0, 1.0)
    assert (record["counts"][0], record["counts"][-1], sum(record["counts"])) == (1, 2, 3)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_a_tensor_without_finite_values_is_an_empty_histogram(value: float) -> None:
    (record,) = Histograms().records(3, 0.0, {"grads/w": torch.full((2, 5), value)})
    assert record["counts"] == [0] * BINS
    assert record["nonfinite"] == 10
    assert (record["min"], record["max"]) == (0.0, 0.0)
    json.dumps(record, allow_nan=False)


def test_records_are_in_the_order_of_the_tensors() -> None:
    tensors = {"params/b": torch.zeros(2), "params/a": torch.ones(3, 3), "grads/a": torch.full((4,), math.nan)}
    records = Histograms().records(7, 12.345678, tensors)
    assert [record["name"] for record in records] == list(tensors)
    assert {(record["step"], record["time"]) for record in records} == {(7, 12.3457)}
    assert [sum(record["counts"]) for record in records] == [2, 9, 0]
    assert [record["nonfinite"] for record in records] == [0, 0, 4]


def test_a_parameter_is_not_changed_and_no_graph_is_recorded() -> None:
    parameter = torch.nn.Parameter(torch.randn(5))
    before = parameter.detach().clone()
    counts, limits = binned([parameter])
    assert torch.equal(parameter, before)
    assert not limits.requires_grad
    assert counts.sum() == 5


# ------------------------------------------------------------------------------------------ many at once


def many() -> dict[str, torch.Tensor]:
    """Tensors of many shapes, strides, precisions and ranges, one of them with non-finite values."""
    generator = torch.Generator().manual_seed(3)
    shapes = [(), (1,), (2, 3, 4), (ROW - 1,), (ROW,), (ROW + 1,), (3, ROW), (40, 40), (0,)]
    tensors = {f"normal/{shape}": torch.randn(shape, generator=generator) for shape in shapes}
    for dtype in (torch.float16, torch.bfloat16, torch.float64):
        tensors[str(dtype)] = torch.randn(300, generator=generator).to(dtype)
    tensors["transposed"] = torch.randn(30, 20, generator=generator).T
    tensors["strided"] = torch.randn(600, generator=generator)[::2]
    for scale in (3e38, 1e30, 1e-20, 1e-30, 1e-37, 1e-40, 1e-43):
        tensors[f"scale/{scale}"] = scale * (2 * torch.rand(500, generator=generator) - 1)
    tensors["far"] = 1000 + torch.rand(500, generator=generator)
    tensors["mixed"] = torch.randn(500, generator=generator)
    tensors["mixed"][::5] = torch.tensor([math.nan, math.inf, -math.inf, math.nan]).repeat(25)
    return tensors


def difference_to_numpy(record: dict[str, object], tensor: torch.Tensor) -> int:
    """How many values are in another bin than with numpy, which bins in double precision."""
    values = tensor.detach().float().double().numpy().ravel()
    finite = values[np.isfinite(values)]
    assert record["nonfinite"] == values.size - finite.size
    assert sum(record["counts"]) == finite.size
    if not finite.size or finite.min() == finite.max():  # numpy would widen an empty range
        return 0
    assert (record["min"], record["max"]) == (finite.min(), finite.max())
    expected, _ = np.histogram(finite, BINS)
    return int(np.abs(np.array(record["counts"]) - expected).sum()) // 2


@pytest.mark.parametrize("chunk", [1, 1000, histograms.CHUNK])
def test_many_tensors_at_once_are_binned_as_numpy_bins_each(chunk: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(histograms, "CHUNK", chunk)
    tensors = many()
    records = Histograms().records(0, 0.0, tensors)
    assert [record["name"] for record in records] == list(tensors)
    for record, tensor in zip(records, tensors.values(), strict=True):
        # A value within rounding of an edge may change its bin, and many denormals lie on edges.
        allowed = 0 if record["name"].startswith("normal") else max(2, tensor.numel() // 100)
        assert difference_to_numpy(record, tensor) <= allowed, record["name"]


def test_chunks_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = Histograms().records(0, 0.0, many())
    for chunk in (1, 300, 2000):
        monkeypatch.setattr(histograms, "CHUNK", chunk)
        assert Histograms().records(0, 0.0, many()) == whole


@pytest.mark.parametrize("chunk", [1, 1000, histograms.CHUNK])
def test_earlier_tensors_leave_nothing_in_the_reused_memory(chunk: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(histograms, "CHUNK", chunk)
    one = Histograms()
    one.records(0, 0.0, {name: torch.full_like(tensor, math.inf) for name, tensor in many().items()})
    assert one.records(0, 0.0, many()) == Histograms().records(0, 0.0, many())
    other = {"params/w": torch.arange(1000.0)}  # of another size
    assert one.records(0, 0.0, other) == Histograms().records(0, 0.0, other)


def test_the_memory_for_a_huge_tensor_is_not_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(histograms, "CHUNK", 1000)
    one = Histograms()
    one.records(0, 0.0, {"params/w": torch.randn(1000)})
    assert one._memory is not None
    one.records(0, 0.0, {"params/w": torch.randn(5000)})
    assert one._memory is None


def test_a_tensor_is_binned_the_same_alone_and_beside_others() -> None:
    tensors = many()
    together = Histograms().records(0, 0.0, tensors)
    alone = [Histograms().records(0, 0.0, {name: tensor})[0] for name, tensor in tensors.items()]
    assert together == alone


def test_binning_does_not_change_the_tensors() -> None:
    tensors = many()
    Histograms().records(0, 0.0, tensors)
    for name, tensor in many().items():
        assert torch.equal(tensor.nan_to_num(7.0), tensors[name].nan_to_num(7.0))


class Operations(TorchDispatchMode):
    """Counts the operations that compute. Views cost the device nothing."""

    count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        returned = function._schema.returns
        is_view = bool(returned) and returned[0].alias_info is not None and not returned[0].alias_info.is_write
        self.count += not is_view
        return function(*args, **(kwargs or {}))


def test_the_number_of_operations_does_not_depend_on_the_number_of_tensors() -> None:
    counts = []
    for n in (2, 20, 200):
        tensors = [torch.nn.Parameter(torch.randn(5, 7)) for _ in range(n)]
        layout = Layout([35] * n, tensors[0].device)
        memory = Memory(layout.rows, tensors[0].device)
        with Operations() as operations:
            bin_tensors(tensors, layout, memory)
        counts.append(operations.count)
    assert counts[0] == counts[1] == counts[2] < 50
