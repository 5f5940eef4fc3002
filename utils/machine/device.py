"""Device, precision, seeds, determinism and threads of a run, and facts about the machine for its record."""

from __future__ import annotations

import contextlib
import functools
import itertools
import os
import platform
import re
import resource
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path

import psutil
import torch

from utils.config.settings import TrainConfig
from utils.errors import UserError
from utils.machine.attention_kernels import attention_order

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}

CGROUPS = Path("/sys/fs/cgroup")
CGROUP_TREES = ("", "unified", "memory")  # below CGROUPS: version 2, version 2 beside version 1, version 1
OWN_CGROUPS = Path("/proc/self/cgroup")
CGROUP_FILES = (  # limit, use and statistics, in version 2 and in version 1; above memory.high a process crawls
    ("memory.max", "memory.current", "memory.stat"),
    ("memory.high", "memory.current", "memory.stat"),
    ("memory.limit_in_bytes", "memory.usage_in_bytes", "memory.stat"),
)
ULIMITS = ((resource.RLIMIT_AS, 0), (resource.RLIMIT_DATA, 5))  # each with the field of statm that it limits

FP8_CAPABILITY = (8, 9)  # Ada, then Hopper

BF16_FLAGS = frozenset({"avx512_bf16", "amx_bf16", "bf16"})  # in /proc/cpuinfo: x86, x86, ARM

# Vendor and family in /proc/cpuinfo -> ranges of models, both ends included, as arch/x86 of Linux names them.
CPU_GENERATIONS: Mapping[tuple[str, str], Sequence[tuple[int, int, str]]] = {
    ("AuthenticAMD", "23"): (
        *((0x00, 0x2F, "Zen"), (0x30, 0x4F, "Zen 2"), (0x50, 0x5F, "Zen"), (0x60, 0x7F, "Zen 2")),
        *((0x90, 0x91, "Zen 2"), (0xA0, 0xAF, "Zen 2")),
    ),
    ("AuthenticAMD", "25"): (
        *((0x00, 0x0F, "Zen 3"), (0x10, 0x1F, "Zen 4"), (0x20, 0x5F, "Zen 3"), (0x60, 0xAF, "Zen 4")),
    ),
    ("AuthenticAMD", "26"): ((0x00, 0x2F, "Zen 5"), (0x40, 0x4F, "Zen 5"), (0x60, 0x7F, "Zen 5")),
    ("GenuineIntel", "6"): (
        *((0x3F, 0x3F, "Haswell"), (0x4F, 0x4F, "Broadwell"), (0x4E, 0x4E, "Skylake"), (0x5E, 0x5E, "Skylake")),
        *((0x55, 0x55, "Skylake or Cascade Lake"), (0x8E, 0x8E, "Kaby Lake"), (0x9E, 0x9E, "Kaby Lake")),
        *((0x6A, 0x6A, "Ice Lake"), (0x6C, 0x6C, "Ice Lake"), (0x7E, 0x7E, "Ice Lake")),
        *((0x8C, 0x8D, "Tiger Lake"), (0xA7, 0xA7, "Rocket Lake"), (0x97, 0x97, "Alder Lake")),
        *((0x9A, 0x9A, "Alder Lake"), (0xB7, 0xB7, "Raptor Lake"), (0xBA, 0xBA, "Raptor Lake")),
        *((0xBF, 0xBF, "Raptor Lake"), (0xAA, 0xAA, "Meteor Lake"), (0xC5, 0xC6, "Arrow Lake")),
        *((0x8F, 0x8F, "Sapphire Rapids"), (0xCF, 0xCF, "Emerald Rapids"), (0xAD, 0xAE, "Granite Rapids")),
    ),
}


class DeviceError(UserError):
    """This machine does not have the requested device or precision."""


def available_devices() -> list[str]:
    """Device names in the order in which `auto` tries them."""
    names = []
    if torch.backends.mps.is_available():
        names.append("mps")
    if torch.cuda.is_available():
        names += ["cuda"] if torch.cuda.device_count() == 1 else [f"cuda:{i}" for i in range(torch.cuda.device_count())]
    return [*names, "cpu"]


def choose_device(name: str) -> torch.device:
    """The device of that name; `auto` is MPS if there is one, else CUDA, else the CPU.

    Raises:
        DeviceError: the device is not available; the message lists those that are.
    """
    available = available_devices()
    if name == "auto":
        return torch.device(available[0])
    try:
        device = torch.device(name)
    except RuntimeError:
        raise DeviceError(f"unknown device {name!r}; available: {', '.join(available)}") from None
    present = {
        "cpu": True,
        "mps": torch.backends.mps.is_available(),
        "cuda": torch.cuda.is_available() and (device.index or 0) < torch.cuda.device_count(),
    }
    if not present.get(device.type, False):
        raise DeviceError(f"device {name} is not available here; available: {', '.join(available)}")
    return device


def choose_dtype(name: str, device: torch.device) -> torch.dtype:
    """The precision of matrix products; `auto` is bfloat16 on a CUDA device that supports it, else float32.

    A CPU uses bfloat16 only on request: small models gain nothing even if the CPU has units for it, and without
    such units it is emulated, 3 times slower than float32 (docs/LOG.md).

    Raises:
        DeviceError: the device does not support it.
    """
    bf16_on_cuda = device.type == "cuda" and has_bf16_units(device)
    if name == "auto":
        return torch.bfloat16 if bf16_on_cuda else torch.float32
    if name == "bfloat16" and device.type == "cuda" and not bf16_on_cuda:
        raise DeviceError(f"dtype bfloat16 is not supported by {torch.cuda.get_device_name(device)}; use float16")
    return DTYPES[name]


def has_bf16_units(device: torch.device) -> bool:
    """Whether the device multiplies bfloat16 matrices natively, several times as fast as float32 ones."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return device.type == "cpu" and not BF16_FLAGS.isdisjoint(_cpu_flags())


def check_fp8(device: torch.device, dtype: torch.dtype) -> None:
    """Raises DeviceError unless the device multiplies 8-bit matrices and `dtype`, for all else, has 16 bits."""
    if device.type != "cuda":
        raise DeviceError(f"fp8 needs a CUDA device, not {device.type}")
    capability = torch.cuda.get_device_capability(device)
    if capability < FP8_CAPABILITY:
        name, has = torch.cuda.get_device_name(device), ".".join(map(str, capability))
        needed = ".".join(map(str, FP8_CAPABILITY))
        raise DeviceError(f"fp8 needs compute capability {needed}: {name} has {has} and no units for it")
    if dtype == torch.float32:
        raise DeviceError("fp8 needs dtype bfloat16 or float16 for all that is not in 8 bits, not float32")


def autocast(device: torch.device, dtype: torch.dtype) -> AbstractContextManager[None]:
    """Mixed precision for a forward pass; does nothing for float32."""
    if dtype == torch.float32:
        return contextlib.nullcontext()
    return torch.autocast(device.type, dtype)


def is_deterministic(config: TrainConfig, device: torch.device) -> bool:
    """Whether to use only operations that repeat bit for bit: the default on the CPU, where they cost nothing."""
    return device.type == "cpu" if config.deterministic is None else config.deterministic


@contextlib.contextmanager
def torch_settings(config: TrainConfig, device: torch.device) -> Iterator[None]:
    """Set the seed, determinism, kernels and threads of a run; restores all but the seed on exit, for notebooks."""
    deterministic = is_deterministic(config, device)
    before = torch.get_deterministic_debug_mode(), torch.get_num_threads(), torch.backends.cudnn.benchmark
    if config.threads is not None:
        torch.set_num_threads(config.threads)
    if config.compile:
        torch.use_deterministic_algorithms(deterministic)  # also tells the compiler, and imports it
    else:
        torch.set_deterministic_debug_mode("error" if deterministic else "default")
    # Nothing here reads memory that was not written, so it need not be filled.
    fill = torch.utils.deterministic.fill_uninitialized_memory  # type: ignore[attr-defined]
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
    torch.backends.cudnn.benchmark = not deterministic
    products = float32_products(tf32=config.tf32) if device.type == "cuda" else contextlib.nullcontext()
    torch.manual_seed(config.seed)
    try:
        with products, attention_order(device):
            yield
    finally:
        torch.set_deterministic_debug_mode(before[0])
        torch.set_num_threads(before[1])
        torch.backends.cudnn.benchmark = before[2]
        torch.utils.deterministic.fill_uninitialized_memory = fill  # type: ignore[attr-defined]


@contextlib.contextmanager
def torch_defaults() -> Iterator[None]:
    """A context with torch's own defaults, whatever a notebook has set: gradients, and new tensors float32 on the CPU.

    An autocast of the caller is switched off. The previous settings are restored on exit.
    """
    dtype, is_cpu = torch.get_default_dtype(), torch.get_default_device().type == "cpu"
    device = contextlib.nullcontext() if is_cpu else torch.device("cpu")  # setting a default slows down every call
    torch.set_default_dtype(torch.float32)
    try:
        with contextlib.ExitStack() as stack:
            for kind in filter(torch.is_autocast_enabled, ("cpu", "cuda", "mps")):
                stack.enter_context(torch.autocast(kind, enabled=False))
            for default in (torch.inference_mode(False), torch.enable_grad(), device):
                stack.enter_context(default)
            yield
    finally:
        torch.set_default_dtype(dtype)


@contextlib.contextmanager
def float32_products(*, tf32: bool) -> Iterator[None]:
    """Set whether a GPU rounds the factors of float32 products to TF32; restores the previous precision on exit.

    This uses torch's older interface, which sets the newer one (`fp32_precision`) as well. If only the newer one is
    set, reading the older one raises, and torch.compile reads it.
    """
    backends = (torch.backends.cuda.matmul, torch.backends.mkldnn.matmul)  # type: ignore[attr-defined]
    before = [backend.fp32_precision for backend in backends]
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Please use the new API settings")  # torch 2.9
        try:
            older = torch.get_float32_matmul_precision()
        except RuntimeError:  # set by the newer interface alone
            older = "highest"
        torch.set_float32_matmul_precision("high" if tf32 else "highest")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(older)
        for backend, precision in zip(backends, before, strict=True):
            backend.fp32_precision = precision


@contextlib.contextmanager
def one_thread() -> Iterator[None]:
    """Compute on one thread inside the block, in a process that computes in another Python thread afterwards.

    GNU's OpenMP keeps a pool of threads for each thread that has computed, and once there are more of them than cores,
    all wait in the kernel instead of spinning: a prompt of 200 tokens took a third longer (docs/LOG.md).
    """
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def processor_name(device: torch.device) -> str:
    """The name of the GPU or CPU that computes: results repeat bit for bit only on the same kind."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else _cpu_name()


def cpu_generation() -> str:
    """The CPU's microarchitecture with its family and model: "Zen 4 (family 25, model 17)".

    Without the name if CPU_GENERATIONS does not have it; empty if the system does not report the numbers.
    """
    vendor, family, model = (_cpuinfo(field) for field in ("vendor_id", "cpu family", "model"))
    if not model.isdigit():
        return ""
    ranges = CPU_GENERATIONS.get((vendor, family), ())
    name = next((name for first, last, name in ranges if first <= int(model) <= last), "")
    return f"{name} (family {family}, model {model})" if name else f"family {family}, model {model}"


def device_facts(device: torch.device) -> Mapping[str, str]:
    """Facts about the devices, for env.txt."""
    facts = {"device": str(device), "torch threads": str(torch.get_num_threads()), "cpu": _cpu_name()}
    for index in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(index)
        facts[f"cuda:{index}"] = f"{properties.name}, {properties.total_memory / 2**30:.0f} GiB"
    if torch.version.cuda:
        facts["cuda"] = torch.version.cuda
    return facts


def _cpu_name() -> str:
    return _cpuinfo("model name") or platform.processor() or platform.machine()


@functools.cache
def _cpu_flags() -> frozenset[str]:
    return frozenset((_cpuinfo("flags") or _cpuinfo("Features")).split())


def _cpuinfo(field: str) -> str:
    """A field of the first core in Linux's /proc/cpuinfo; empty if there is none."""
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as file:
            pairs = (line.split(":", 1) for line in file if ":" in line)
            return next(value.strip() for name, value in pairs if name.strip() == field)
    except (OSError, StopIteration):
        return ""


def memory_in_use(device: torch.device) -> int:
    """Bytes held by tensors on a GPU, else by the process (its peak if there is no /proc)."""
    if device.type == "cuda":
        return torch.cuda.memory_allocated(device)
    if (statm := _statm(os.getpid())) is None:
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return int(os.pread(statm, 128, 0).split()[1]) * resource.getpagesize()


def available_memory(device: torch.device) -> int:
    """Bytes that the process can still allocate: those free on the GPU, or in the machine and its container."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    available = [psutil.virtual_memory().available]
    if device.type == "mps":  # the GPU uses the same memory, but not all of it
        available.append(torch.mps.recommended_max_memory() - torch.mps.driver_allocated_memory())
    for folder, names in itertools.product(_memory_cgroups(), CGROUP_FILES):
        with contextlib.suppress(OSError, ValueError):  # not this version of cgroups, or no limit ("max")
            limit, used, statistics = ((folder / name).read_text() for name in names)
            # Cached files are dropped when memory is needed.
            caches = re.findall(r"^(?:total_)?inactive_file (\d+)$", statistics, re.MULTILINE)
            available.append(int(limit) - int(used) + max(map(int, caches), default=0))
    for kind, field in ULIMITS:
        limit_of_process, _ = resource.getrlimit(kind)
        if limit_of_process != resource.RLIM_INFINITY and (statm := _statm(os.getpid())) is not None:
            pages = os.pread(statm, 128, 0).split()[field]
            available.append(limit_of_process - int(pages) * resource.getpagesize())
    return max(0, min(available))


def _memory_cgroups() -> Iterator[Path]:
    """The folders of the cgroups that limit the memory of this process: its own, and every one above it."""
    try:
        lines = [line.split(":", 2) for line in OWN_CGROUPS.read_text().splitlines()]
    except OSError:  # not Linux
        return
    paths = [path for _, controllers, path in lines if controllers == "" or "memory" in controllers.split(",")]
    parts = [[part for part in path.split("/") if part not in ("", "..")] for path in paths]
    for tree, own in itertools.product(CGROUP_TREES, [[], *parts]):
        root = CGROUPS / tree
        # A container may see only a part of the tree, without the first folders of the path.
        seen = next((own[first:] for first in range(len(own)) if (root / own[first]).is_dir()), [])
        yield from (root.joinpath(*seen[:count]) for count in range(len(seen) + 1))


@functools.cache
def _statm(pid: int) -> int | None:
    """A descriptor of the file with the memory use of this process, kept open because every write of the log reads it.

    Args:
        pid: the id of this process, so that a forked one does not use the descriptor of its parent.
    """
    try:
        return os.open(f"/proc/{pid}/statm", os.O_RDONLY | os.O_CLOEXEC)
    except OSError:
        return None


def synchronize(device: torch.device) -> None:
    """Wait until the device has finished its work, so that the clock can be read."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    elif device.type == "mps":
        torch.mps.synchronize()
