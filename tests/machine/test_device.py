"""Choice of device and precision on simulated machines, process-wide settings, and the name of the processor."""

from __future__ import annotations

import io
from collections.abc import Callable

import pytest
import torch

from utils.config.settings import TrainConfig
from utils.errors import UserError
from utils.machine import device
from utils.machine.device import (
    DeviceError,
    autocast,
    available_devices,
    check_fp8,
    choose_device,
    choose_dtype,
    device_facts,
    is_deterministic,
    torch_settings,
)

CPU, CUDA = torch.device("cpu"), torch.device("cuda")


@pytest.fixture(autouse=True)
def ampere(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _device: (8, 0))


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Makes torch report this many CUDA devices, and MPS or not."""

    def pretend(cuda: int = 0, mps: bool = False, bf16: bool = True) -> None:
        monkeypatch.setattr(torch.cuda, "is_available", lambda: cuda > 0)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: cuda)
        monkeypatch.setattr(
            torch.cuda, "is_bf16_supported", lambda including_emulation=True: bf16 or including_emulation
        )
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda device=None: "Imitation 9000")
        monkeypatch.setattr(torch.backends.mps, "is_available", lambda: mps)

    return pretend


@pytest.mark.parametrize(
    ("cuda", "mps", "names"),
    [
        (0, False, ["cpu"]),
        (1, False, ["cuda", "cpu"]),
        (2, False, ["cuda:0", "cuda:1", "cpu"]),
        (0, True, ["mps", "cpu"]),
        (1, True, ["mps", "cuda", "cpu"]),
    ],
)
def test_auto_prefers_mps_then_cuda_then_cpu(
    machine: Callable[..., None], cuda: int, mps: bool, names: list[str]
) -> None:
    machine(cuda, mps)
    assert available_devices() == names
    assert choose_device("auto") == torch.device(names[0])


@pytest.mark.parametrize("name", ["cpu", "mps", "cuda", "cuda:0", "cuda:1"])
def test_a_named_device_that_exists_is_chosen(machine: Callable[..., None], name: str) -> None:
    machine(cuda=2, mps=True)
    assert choose_device(name) == torch.device(name)


@pytest.mark.parametrize(
    ("name", "cuda", "mps", "available"),
    [
        ("cuda", 0, False, "cpu"),
        ("cuda:0", 0, True, "mps, cpu"),
        ("mps", 0, False, "cpu"),
        ("mps", 1, False, "cuda, cpu"),
        ("cuda:1", 1, False, "cuda, cpu"),
        ("cuda:2", 2, False, "cuda:0, cuda:1, cpu"),
    ],
)
def test_a_missing_device_is_an_error_that_lists_the_available_ones(
    machine: Callable[..., None], name: str, cuda: int, mps: bool, available: str
) -> None:
    machine(cuda, mps)
    with pytest.raises(DeviceError) as caught:
        choose_device(name)
    assert str(caught.value) == f"device {name} is not available here; available: {available}"
    assert isinstance(caught.value, UserError)


@pytest.mark.parametrize("name", ["gpu", "cuda:x", "", "meta", "xpu"])
def test_an_unknown_device_is_an_error_that_lists_the_available_ones(machine: Callable[..., None], name: str) -> None:
    """The --device of inference.py is not checked by the configuration."""
    machine()
    with pytest.raises(DeviceError, match="available: cpu"):
        choose_device(name)


@pytest.mark.parametrize(
    ("name", "device", "bf16", "dtype"),
    [
        ("auto", "cpu", True, torch.float32),
        ("auto", "mps", True, torch.float32),
        ("auto", "cuda", True, torch.bfloat16),
        ("auto", "cuda", False, torch.float32),
        ("float32", "cuda", True, torch.float32),
        ("float16", "cuda", False, torch.float16),
        ("bfloat16", "cuda", True, torch.bfloat16),
        ("bfloat16", "cpu", False, torch.bfloat16),
    ],
)
def test_the_precision_is_the_requested_one_or_suits_the_device(
    machine: Callable[..., None], name: str, device: str, bf16: bool, dtype: torch.dtype
) -> None:
    machine(cuda=1, bf16=bf16)
    assert choose_dtype(name, torch.device(device)) == dtype


def test_bfloat16_on_a_gpu_without_it_is_an_error_that_suggests_float16(machine: Callable[..., None]) -> None:
    machine(cuda=1, bf16=False)
    with pytest.raises(DeviceError, match="bfloat16 is not supported by Imitation 9000; use float16"):
        choose_dtype("bfloat16", CUDA)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_autocast_computes_products_in_that_precision(dtype: torch.dtype) -> None:
    with autocast(CPU, dtype):
        assert (torch.ones(2, 2) @ torch.ones(2, 2)).dtype == dtype
    assert (torch.ones(2, 2) @ torch.ones(2, 2)).dtype == torch.float32


@pytest.mark.parametrize("deterministic", [True, False])
def test_determinism_is_set_and_restored(deterministic: bool) -> None:
    before = torch.are_deterministic_algorithms_enabled()
    with torch_settings(TrainConfig(deterministic=deterministic), CPU):
        assert torch.are_deterministic_algorithms_enabled() is deterministic
        assert torch.backends.cudnn.benchmark is not deterministic
    assert torch.are_deterministic_algorithms_enabled() is before


@pytest.mark.parametrize(("tf32", "precision"), [(True, "tf32"), (False, "ieee")])
def test_float32_products_on_cuda_have_the_requested_precision(tf32: bool, precision: str) -> None:
    products = torch.backends.cuda.matmul
    before = float32_precisions()
    with torch_settings(TrainConfig(tf32=tf32), CPU):
        assert float32_precisions() == before
    with torch_settings(TrainConfig(tf32=tf32), CUDA):
        assert products.fp32_precision == precision
        assert products.allow_tf32 is tf32  # torch.compile reads the older interface, which raises if the two disagree
        assert torch.get_float32_matmul_precision() == ("high" if tf32 else "highest")
    assert float32_precisions() == before


def float32_precisions() -> tuple[str, str, str]:
    backends = torch.backends
    return (
        torch.get_float32_matmul_precision(),
        backends.cuda.matmul.fp32_precision,
        backends.mkldnn.matmul.fp32_precision,
    )


def test_a_precision_that_only_the_newer_interface_set_is_restored() -> None:
    products = torch.backends.cuda.matmul
    before, products.fp32_precision = products.fp32_precision, "tf32"  # now torch.get_float32_matmul_precision raises
    try:
        with torch_settings(TrainConfig(tf32=False), CUDA):
            assert products.fp32_precision == "ieee"
        assert products.fp32_precision == "tf32"
    finally:
        products.fp32_precision = before


@pytest.mark.parametrize(
    ("setting", "device", "deterministic"),
    [(None, CPU, True), (None, CUDA, False), (True, CUDA, True), (False, CPU, False)],
)
def test_determinism_is_the_default_only_on_the_cpu(
    setting: bool | None, device: torch.device, deterministic: bool
) -> None:
    assert is_deterministic(TrainConfig(deterministic=setting), device) is deterministic


@pytest.mark.parametrize("seed", [0, 1337, 2**63 - 1])
def test_the_seed_decides_the_random_numbers(seed: int) -> None:
    drawn = []
    for used in (seed, seed, seed ^ 1):
        with torch_settings(TrainConfig(seed=used), CPU):
            drawn.append(torch.rand(3))
    assert torch.equal(drawn[0], drawn[1])
    assert not torch.equal(drawn[0], drawn[2])


def test_threads_are_set_on_request_and_restored() -> None:
    before = torch.get_num_threads()
    with torch_settings(TrainConfig(), CPU):
        assert torch.get_num_threads() == before
    with torch_settings(TrainConfig(threads=1), CPU):
        assert torch.get_num_threads() == 1
    assert torch.get_num_threads() == before


def test_facts_name_the_device_and_the_threads() -> None:
    facts = device_facts(CPU)
    assert facts["device"] == "cpu"
    assert facts["torch threads"] == str(torch.get_num_threads())
    assert facts["cpu"]


@pytest.mark.parametrize(
    ("cpuinfo", "has"),
    [("flags\t: fpu avx512f avx512_bf16 sse", True), ("Features\t: fp asimd bf16", True), ("flags\t: fpu avx2", False)],
)
def test_units_for_bfloat16_are_recognised_by_the_flags_of_the_processor(
    cpuinfo: str, has: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    fields = dict(line.split("\t: ") for line in [cpuinfo])
    monkeypatch.setattr(device, "_cpuinfo", lambda field: fields.get(field, ""))
    device._cpu_flags.cache_clear()
    assert device.has_bf16_units(CPU) is has
    device._cpu_flags.cache_clear()


@pytest.mark.parametrize(
    ("vendor", "family", "model", "shown"),
    [
        ("AuthenticAMD", "23", "49", "Zen 2 (family 23, model 49)"),
        ("AuthenticAMD", "25", "1", "Zen 3 (family 25, model 1)"),
        ("AuthenticAMD", "25", "17", "Zen 4 (family 25, model 17)"),
        ("AuthenticAMD", "26", "2", "Zen 5 (family 26, model 2)"),
        ("GenuineIntel", "6", "143", "Sapphire Rapids (family 6, model 143)"),
        ("GenuineIntel", "6", "250", "family 6, model 250"),
        ("AuthenticAMD", "99", "1", "family 99, model 1"),
        ("", "", "", ""),  # not x86, or not Linux
    ],
)
def test_the_generation_of_a_cpu_is_derived_from_its_family_and_model(
    vendor: str, family: str, model: str, shown: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    fields = {"vendor_id": vendor, "cpu family": family, "model": model}
    monkeypatch.setattr(device, "_cpuinfo", fields.__getitem__)
    assert device.cpu_generation() == shown


def test_a_field_of_the_processor_is_found_by_its_whole_name(monkeypatch: pytest.MonkeyPatch) -> None:
    lines = "processor\t: 0\nmodel name\t: A: B\nmodel\t\t: 17\n\nmodel\t\t: 18\n"
    monkeypatch.setattr("builtins.open", lambda *_, **__: io.StringIO(lines))
    assert [device._cpuinfo(field) for field in ("model", "model name", "flags")] == ["17", "A: B", ""]


@pytest.mark.parametrize(
    ("device", "capability", "dtype", "message"),
    [
        (CPU, (9, 0), torch.bfloat16, "a CUDA device, not cpu"),
        (torch.device("mps"), (9, 0), torch.bfloat16, "a CUDA device, not mps"),
        (CUDA, (8, 6), torch.bfloat16, r"compute capability 8\.9: Imitation 9000 has 8\.6"),
        (CUDA, (9, 0), torch.float32, "not float32"),
    ],
)
def test_fp8_is_refused_on_a_device_or_precision_that_does_not_support_it(
    machine: Callable[..., None],
    monkeypatch: pytest.MonkeyPatch,
    device: torch.device,
    capability: tuple[int, int],
    dtype: torch.dtype,
    message: str,
) -> None:
    machine(cuda=1)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _device: capability)
    with pytest.raises(DeviceError, match=message):
        check_fp8(device, dtype)


@pytest.mark.parametrize("capability", [(8, 9), (9, 0), (10, 0)])
def test_fp8_is_accepted_from_compute_capability_8_9_on(
    monkeypatch: pytest.MonkeyPatch, capability: tuple[int, int]
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _device: capability)
    check_fp8(CUDA, torch.bfloat16)
    check_fp8(CUDA, torch.float16)
