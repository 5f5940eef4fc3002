"""Histograms of tensors against numpy's."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
import torch

from utils.histograms import BINS, bin_tensors, histogram_records


def counts_and_range(values: torch.Tensor) -> tuple[list[int], float, float]:
    (counts,), ((low, high),) = bin_tensors([values])
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


def test_nonfinite_values_are_counted_apart() -> None:
    values = torch.tensor([0.0, math.nan, 1.0, math.inf, -math.inf, 1.0])
    (record,) = histogram_records(3, 12.34567, {"params/w": values})
    assert record["nonfinite"] == 3
    assert (record["min"], record["max"]) == (0.0, 1.0)
    assert (record["counts"][0], record["counts"][-1], sum(record["counts"])) == (1, 2, 3)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_a_tensor_without_finite_values_is_an_empty_histogram(value: float) -> None:
    (record,) = histogram_records(3, 0.0, {"grads/w": torch.full((2, 5), value)})
    assert record["counts"] == [0] * BINS
    assert record["nonfinite"] == 10
    assert (record["min"], record["max"]) == (0.0, 0.0)
    json.dumps(record, allow_nan=False)


def test_records_are_in_the_order_of_the_tensors() -> None:
    tensors = {"params/b": torch.zeros(2), "params/a": torch.ones(3, 3), "grads/a": torch.full((4,), math.nan)}
    records = histogram_records(7, 12.345678, tensors)
    assert [record["name"] for record in records] == list(tensors)
    assert {(record["step"], record["time"]) for record in records} == {(7, 12.3457)}
    assert [sum(record["counts"]) for record in records] == [2, 9, 0]
    assert [record["nonfinite"] for record in records] == [0, 0, 4]


def test_a_parameter_and_its_graph_are_left_alone() -> None:
    parameter = torch.nn.Parameter(torch.randn(5))
    before = parameter.detach().clone()
    counts, limits = bin_tensors([parameter])
    assert torch.equal(parameter, before)
    assert not limits.requires_grad
    assert counts.sum() == 5
