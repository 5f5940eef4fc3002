"""Muon: orthogonal updates, compared with PyTorch's Muon, and AdamW for the other groups."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from utils.optim import muon
from utils.optim.muon import Muon, _nesterov, newton_schulz, update_scale


def matrices(n: int, rows: int, columns: int) -> torch.Tensor:
    return torch.randn(n, rows, columns, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("shape", [(3, 8, 8), (2, 16, 64), (1, 1, 5)])
def test_newton_schulz_brings_all_singular_values_near_one(shape: tuple[int, int, int]) -> None:
    """Even for a badly conditioned matrix, with singular values from 1 to 0.1."""
    u, _, vh = torch.linalg.svd(matrices(*shape), full_matrices=False)
    spread = u @ torch.diag(torch.linspace(1, 0.1, shape[1])) @ vh
    values = torch.linalg.svdvals(newton_schulz(spread))
    assert values.min() > 0.65
    assert values.max() < 1.25


def test_newton_schulz_keeps_the_singular_vectors() -> None:
    """The result is u s v^T with all s near 1, so it is near the polar factor u v^T."""
    x = matrices(4, 8, 24)
    u, _, vh = torch.linalg.svd(x, full_matrices=False)
    y = newton_schulz(x)
    aligned = u.mT @ y @ vh.mT  # diagonal
    assert (aligned - torch.diag_embed(aligned.diagonal(dim1=-2, dim2=-1))).abs().max() < 1e-4


@pytest.mark.parametrize(("units", "tolerance"), [(True, 0.03), (False, 1e-5)])
def test_updates_are_computed_in_bfloat16_if_the_device_has_units_for_it(
    units: bool, tolerance: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(muon, "has_bf16_units", lambda device: units)
    weight = torch.nn.Parameter(torch.zeros(8, 8))
    weight.grad = matrices(1, 8, 8)[0]
    Muon([{"params": [weight], "lr": 1.0, "weight_decay": 0.0, "momentum": 0.0, "blocks": [[8]]}]).step()
    expected = -update_scale((8, 8)) * newton_schulz(weight.grad[None])[0]
    error = (weight.detach() - expected).norm() / expected.norm()
    assert error < tolerance
    assert units == (error > 1e-4)


def test_newton_schulz_treats_each_matrix_of_a_batch_alone() -> None:
    together = torch.cat([1000 * matrices(1, 4, 6), matrices(2, 4, 6)])
    for one, result in zip(together, newton_schulz(together), strict=True):
        torch.testing.assert_close(newton_schulz(one[None])[0], result, rtol=1e-4, atol=1e-4)


def test_newton_schulz_of_a_zero_gradient_is_zero() -> None:
    assert newton_schulz(torch.zeros(2, 3, 4)).tolist() == torch.zeros(2, 3, 4).tolist()


@pytest.mark.parametrize("shape", [(16, 16), (8, 32), (32, 8)])
@pytest.mark.parametrize("weight_decay", [0.0, 0.3])
def test_muon_updates_like_torch(shape: tuple[int, int], weight_decay: float) -> None:
    """Updates differ by a few percent of their size, because torch computes in bfloat16, which has 8 bits."""
    ours = torch.nn.Parameter(matrices(1, *shape)[0])
    theirs = torch.nn.Parameter(ours.detach().clone())
    group = {"params": [ours], "lr": 0.01, "weight_decay": weight_decay, "momentum": 0.9, "blocks": [[shape[0]]]}
    optimizer = Muon([group])
    settings: dict[str, Any] = {"weight_decay": weight_decay, "momentum": 0.9, "adjust_lr_fn": "match_rms_adamw"}
    reference = torch.optim.Muon([theirs], lr=0.01, **settings)
    generator = torch.Generator().manual_seed(1)
    for _ in range(5):
        before = theirs.detach().clone()
        ours.grad = torch.randn(shape, generator=generator)
        theirs.grad = ours.grad.clone()
        optimizer.step()
        reference.step()
        update = (theirs.detach() - before).norm()
        assert (ours - theirs).norm() < 0.03 * update
        theirs.data.copy_(ours.data)


def test_each_block_of_a_parameter_is_orthogonalised_alone() -> None:
    """A fused q, k, v matrix with fewer key/value heads is trained as three matrices."""
    fused = torch.nn.Parameter(matrices(1, 16, 8)[0])
    parts = [torch.nn.Parameter(part.clone()) for part in fused.detach().split([8, 4, 4])]
    common = {"lr": 0.1, "weight_decay": 0.1, "momentum": 0.95}
    together = Muon([{"params": [fused], "blocks": [[8, 4, 4]], **common}])
    alone = Muon([{"params": parts, "blocks": [[8], [4], [4]], **common}])
    for seed in range(3):
        fused.grad = torch.randn(16, 8, generator=torch.Generator().manual_seed(seed))
        for part, gradient in zip(parts, fused.grad.split([8, 4, 4]), strict=True):
            part.grad = gradient.clone()
        together.step()
        alone.step()
    torch.testing.assert_close(fused.detach(), torch.cat([part.detach() for part in parts]), rtol=1e-5, atol=1e-6)


def test_a_parameter_of_three_dimensions_is_flattened_after_its_first() -> None:
    cube, matrix = (torch.nn.Parameter(torch.zeros(shape)) for shape in ((8, 2, 3), (8, 6)))
    matrix.grad = matrices(1, 8, 6)[0]
    cube.grad = matrix.grad.view(8, 2, 3)
    for weight in (cube, matrix):
        Muon([{"params": [weight], "lr": 1.0, "weight_decay": 0.0, "momentum": 0.0, "blocks": [[8]]}]).step()
    assert torch.equal(cube.view(8, 6), matrix)
    assert cube.any()


def test_updates_are_as_large_as_those_of_adamw() -> None:
    """The root mean square of an update is about 0.2 for any shape."""
    for shape in ((16, 16), (16, 64), (64, 16)):
        weight = torch.nn.Parameter(torch.zeros(shape))
        weight.grad = matrices(1, *shape)[0]
        Muon([{"params": [weight], "lr": 1.0, "weight_decay": 0.0, "momentum": 0.0, "blocks": [[shape[0]]]}]).step()
        assert weight.pow(2).mean().sqrt().item() == pytest.approx(0.2, rel=0.2)
    assert update_scale((16, 64)) == update_scale((64, 16)) == 1.6


def test_groups_without_blocks_are_trained_by_adamw() -> None:
    """They equal PyTorch's fused AdamW bit for bit."""
    ours = [torch.nn.Parameter(matrices(1, 3, 4)[0]), torch.nn.Parameter(torch.ones(5))]
    theirs = [torch.nn.Parameter(p.detach().clone()) for p in ours]
    settings: dict[str, Any] = {"lr": 0.02, "betas": (0.8, 0.95), "eps": 1e-9, "weight_decay": 0.1}
    optimizer = Muon([{"params": ours, **settings}])
    reference = torch.optim.AdamW(theirs, fused=True, **settings)
    for seed in range(4):
        for a, b in zip(ours, theirs, strict=True):
            a.grad = torch.randn(a.shape, generator=torch.Generator().manual_seed(seed))
            b.grad = a.grad.clone()
        optimizer.step()
        reference.step()
    for a, b in zip(ours, theirs, strict=True):
        assert torch.equal(a, b)


def test_parameters_without_a_gradient_stay_as_they_are() -> None:
    weight, vector = torch.nn.Parameter(torch.ones(2, 2)), torch.nn.Parameter(torch.ones(2))
    common = {"lr": 0.1, "weight_decay": 0.5}
    optimizer = Muon(
        [
            {"params": [weight], "momentum": 0.9, "blocks": [[2]], **common},
            {"params": [vector], "betas": (0.9, 0.99), "eps": 1e-8, **common},
        ]
    )
    optimizer.step()
    assert weight.tolist() == [[1, 1], [1, 1]]
    assert vector.tolist() == [1, 1]
    assert not optimizer.state


def test_a_momentum_on_the_device_updates_buffers_like_a_number() -> None:
    gradients = [matrices(1, 3, 4)[0], matrices(2, 2, 5)[1]]
    results = []
    for momentum in (0.9, torch.tensor(0.9)):
        buffers = [gradient.flip(0).clone() for gradient in gradients]
        results.append((buffers, _nesterov(buffers, gradients, momentum)))
    (buffers, directions), (same_buffers, same_directions) = results
    for one, other in zip([*buffers, *directions], [*same_buffers, *same_directions], strict=True):
        torch.testing.assert_close(one, other)
    torch.testing.assert_close(buffers[0], 0.9 * gradients[0].flip(0) + 0.1 * gradients[0])
    torch.testing.assert_close(directions[0], 0.1 * gradients[0] + 0.9 * buffers[0])


@pytest.mark.parametrize("found", [0.0, 1.0])
def test_muon_skips_a_step_with_gradients_that_are_not_finite(found: float) -> None:
    """With found_inf 0 a step is the usual one; with 1 it changes nothing."""
    results = []
    for found_inf in (None, torch.tensor(found)):
        params = [torch.nn.Parameter(matrices(1, 4, 6)[0]), torch.nn.Parameter(matrices(1, 6, 4)[0])]
        group = {"params": params, "lr": 0.1, "weight_decay": 0.2, "momentum": 0.9, "blocks": [[4], [6]]}
        optimizer = Muon([group])
        for step in range(2):
            optimizer.found_inf = found_inf if step else None
            for seed, parameter in enumerate(params):
                parameter.grad = torch.randn(parameter.shape, generator=torch.Generator().manual_seed(seed + step))
                if step and found:
                    parameter.grad[0, 0] = torch.nan
            before = [parameter.detach().clone() for parameter in params]
            optimizer.step()
        buffers = [optimizer.state[parameter]["momentum_buffer"] for parameter in params]
        results.append(([*(p.detach() for p in params), *buffers], before))
    (plain, _), (guarded, before) = results
    if found:
        assert all(map(torch.equal, guarded[:2], before))
        assert all(buffer.isfinite().all() and buffer.any() for buffer in guarded[2:])
    else:
        assert all(map(torch.equal, guarded, plain))


def test_newton_schulz_is_the_quintic_iteration_of_each_matrix() -> None:
    x = 1e-3 * matrices(3, 4, 6).double()  # small matrices are scaled up
    result = newton_schulz(x)
    for one, found in zip(x, result, strict=True):
        expected = one / one.norm()
        for _ in range(5):
            gram = expected @ expected.T
            expected = 3.4445 * expected + (-4.7750 * gram + 2.0315 * gram @ gram) @ expected
        torch.testing.assert_close(found, expected.float())


@pytest.mark.parametrize("found_inf", [None, 0.0, 1.0])
def test_settings_on_the_device_update_like_numbers(found_inf: float | None) -> None:
    """Recorded steps have their settings on the device."""
    results = []
    for kind in (float, torch.tensor):
        weight = torch.nn.Parameter(matrices(1, 4, 6)[0])
        common = {"lr": kind(0.1), "weight_decay": kind(0.2), "momentum": kind(0.9)}
        optimizer = Muon([{"params": [weight], "blocks": [[2, 2]], **common}])
        optimizer.found_inf = None if found_inf is None else torch.tensor(found_inf)
        for seed in range(2):
            weight.grad = torch.randn(4, 6, generator=torch.Generator().manual_seed(seed))
            optimizer.step()
        results.append((weight.detach(), optimizer.state[weight]["momentum_buffer"]))
    for number, tensor in zip(*results, strict=True):
        torch.testing.assert_close(tensor, number)
    assert torch.equal(results[0][0], matrices(1, 4, 6)[0]) == (found_inf == 1)


def test_muon_follows_its_formula(monkeypatch: pytest.MonkeyPatch) -> None:
    """Wide, tall and stacked matrices in one group, and one without a gradient."""
    monkeypatch.setattr(muon, "has_bf16_units", lambda device: False)
    shapes = {"wide": (4, 6), "tall": (6, 4), "other wide": (4, 6), "stacked": (8, 4), "idle": (4, 6)}
    blocks = {"stacked": [4, 2, 2]}
    generator = torch.Generator().manual_seed(2)
    params = {name: torch.nn.Parameter(torch.randn(shape, generator=generator)) for name, shape in shapes.items()}
    expected = {name: p.detach().double().clone() for name, p in params.items()}
    buffers = {name: torch.zeros(shape, dtype=torch.float64) for name, shape in shapes.items()}
    rows = [blocks.get(name, [shape[0]]) for name, shape in shapes.items()]
    group = {"params": [*params.values()], "blocks": rows, "lr": 0.3, "weight_decay": 0.5, "momentum": 0.8}
    optimizer = Muon([group])
    for _ in range(3):
        for name, parameter in params.items():
            if name == "idle":
                continue
            parameter.grad = torch.randn(parameter.shape, generator=generator)
            gradient = parameter.grad.double()
            buffers[name] = 0.8 * buffers[name] + 0.2 * gradient
            direction = 0.2 * gradient + 0.8 * buffers[name]
            expected[name] *= 1 - 0.3 * 0.5
            parts = zip(expected[name].split(blocks.get(name, 99)), direction.split(blocks.get(name, 99)), strict=True)
            for weight, block in parts:
                tall = block.size(0) > block.size(1)
                update = newton_schulz((block.mT if tall else block)[None])[0].double()
                weight -= 0.3 * 0.2 * max(block.shape) ** 0.5 * (update.mT if tall else update)
        optimizer.step()
        for name, parameter in params.items():
            torch.testing.assert_close(parameter.detach().double(), expected[name], rtol=1e-5, atol=1e-5)
            if name != "idle":
                torch.testing.assert_close(optimizer.state[parameter]["momentum_buffer"].double(), buffers[name])
    assert params["idle"] not in optimizer.state
