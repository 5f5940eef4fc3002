"""Sharded models [Zhao et al. 2023, PyTorch FSDP]: each rank keeps a share of the rows of every parameter.

torch's fully_shard gathers the weights of a block before its forward and backward passes, and sums the gradients so
that each rank has the sums of its rows. Its parameters are DTensors; optimizer, checkpoints and export see the rows of
this rank as plain tensors in the same memory (`Shards.own`).
"""

from __future__ import annotations

import contextlib
import types
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method
from torch.overrides import TorchFunctionMode

from model import LanguageModel
from utils.checkpoints.index import rows_of
from utils.checkpoints.shards import rows_in
from utils.config.settings import ModelConfig
from utils.errors import UserError
from utils.machine.ranks import Ranks
from utils.nn.costs import IN_PLACE
from utils.nn.roles import declared_roles


class Shards:
    """This rank's rows of the parameters of a sharded model.

    own: parameter name -> its rows on this rank, (rows, ...), in the memory that the model gathers from; the optimizer
        updates them.
    shapes: parameter name -> the shape of the whole parameter.
    """

    def __init__(self, model: LanguageModel, ranks: Ranks) -> None:
        self.model, self.ranks = model, ranks
        self._parameters: dict[str, Any] = dict(model.named_parameters())
        self.shapes = {name: parameter.shape for name, parameter in self._parameters.items()}
        with torch.no_grad():
            self.own = {name: nn.Parameter(parameter.to_local()) for name, parameter in self._parameters.items()}
        self.names = {parameter: name for name, parameter in self.own.items()}

    def named_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """Like `nn.Module.named_parameters`, but with the rows of this rank."""
        return iter(self.own.items())

    def replace_in(self, groups: list[dict[str, Any]]) -> None:
        """Make an optimizer update the rows of this rank instead of the model's parameters."""
        own = {parameter: self.own[name] for name, parameter in self._parameters.items()}
        for group in groups:
            group["params"] = [own[parameter] for parameter in group["params"]]

    def rows(self, name: str, rank: int | None = None) -> tuple[int, int]:
        """The rows of a parameter that a rank has (None: this rank), as the first one and the end."""
        rank = self.ranks.rank if rank is None else rank
        return rows_of(self.shapes[name][0], rank, self.ranks.world_size)

    def shape_of(self, name: str, tensor: torch.Tensor) -> torch.Size:
        """The shape of the whole tensor `name` (`parameter` or `parameter/key`), of which this rank has `tensor`."""
        if not tensor.dim():
            return tensor.shape
        return torch.Size((self.shapes[name.partition("/")[0]][0], *tensor.shape[1:]))

    def part_of(self, tensors: Mapping[str, torch.Tensor]) -> Mapping[str, torch.Tensor]:
        """This rank's rows of whole tensors, each of which is read on access."""
        return _Part(self, tensors)

    @contextlib.contextmanager
    def whole_outside_blocks(self) -> Iterator[None]:
        """Gather the parameters outside of the blocks, for calls of parts of the model; blocks gather their own."""
        assert isinstance(self.model, FSDPModule)
        self.model.unshard()
        try:
            yield
        finally:
            self.model.reshard()

    def exchange(self, values: torch.Tensor, sent: Sequence[int], received: Sequence[int]) -> torch.Tensor:
        """Send `sent[i]` of the values, (n,), to each rank i, in their order, and receive `received[i]` from it."""
        result = values.new_empty(sum(received))
        if self.ranks.several:
            self.ranks.together(
                lambda: dist.all_to_all_single(result, values, list(received), list(sent), async_op=True)
            )
        return result

    def pieces(self, name: str, own: torch.Tensor) -> Iterator[torch.Tensor]:
        """On rank 0: yield the rows of a whole tensor, those of each rank in turn, in host memory.

        All ranks must exhaust the iterator; those other than 0 send their rows and yield nothing.

        Args:
            own: this rank's rows of parameter `name` or of its gradient.
        """
        rank, world_size = self.ranks.rank, self.ranks.world_size
        if rank == 0:
            yield own.detach().cpu()
        for sender in range(1, world_size):
            first, end = self.rows(name, sender)
            count = (end - first) * self.shapes[name][1:].numel()
            if not count:
                return
            sent, received = [0] * world_size, [0] * world_size
            if rank == sender:
                sent[0] = count
            if rank == 0:
                received[sender] = count
            values = own.detach().reshape(-1) if rank == sender else own.detach().new_empty(0)
            piece = self.exchange(values, sent, received)
            if rank == 0:
                yield piece.view(end - first, *self.shapes[name][1:]).cpu()

    def whole_tensors(self) -> Iterator[tuple[str, torch.Tensor]]:
        """On rank 0: yield each parameter and gradient, `params/name` and `grads/name`. All ranks must call it."""
        for name, own in self.own.items():
            for kind, tensor in (("params", own), ("grads", own.grad)):
                if tensor is not None and (found := list(self.pieces(name, tensor))):
                    yield f"{kind}/{name}", torch.cat(found)

    def take_gradients(self) -> list[torch.Tensor | None]:
        """Return the gradients of this rank's rows and clear them in the model."""
        found = []
        for parameter in self._parameters.values():
            found.append(None if parameter.grad is None else parameter.grad.to_local())
            parameter.grad = None
        return found


class _Part(Mapping[str, torch.Tensor]):
    """See `Shards.part_of`."""

    def __init__(self, shards: Shards, tensors: Mapping[str, torch.Tensor]) -> None:
        self._shards, self._tensors = shards, tensors

    def __getitem__(self, name: str) -> torch.Tensor:
        parameter = name.partition("/")[0]
        if parameter not in self._shards.shapes or name == f"{parameter}/step":
            return self._tensors[name]
        return rows_in(self._tensors, name, *self._shards.rows(parameter))

    def __iter__(self) -> Iterator[str]:
        return iter(self._tensors)

    def __len__(self) -> int:
        return len(self._tensors)


# ------------------------------------------------------------------------------------------------ making a model


def sharded_model(
    config: ModelConfig, vocab_size: int, device: torch.device, dtype: torch.dtype, ranks: Ranks
) -> tuple[LanguageModel, Shards]:
    """Make a sharded model with the values of `LanguageModel(config, vocab_size)`, and leave the same random state.

    The host holds one whole parameter at a time.

    Args:
        device, dtype: where and in what precision to compute; the shards are float32.

    Raises:
        UserError: the model initialises itself in a way that cannot be repeated parameter by parameter.
    """
    initialisation = Initialisation(ranks)
    with torch.device("meta"), initialisation:
        model = LanguageModel(config, vocab_size)
    values = {name: initialisation.rows_of(name, parameter) for name, parameter in model.named_parameters()}
    buffers = dict(model.named_buffers())
    distribute(model, device, dtype, ranks)
    model.to_empty(device=device)
    for name, buffer in model.named_buffers():
        buffer.copy_(buffers[name])
    shards = Shards(model, ranks)
    with torch.no_grad():
        for name, own in shards.own.items():
            own.copy_(values.pop(name))
    model.initialised = declared_roles(model)
    return model, shards


class Initialisation(TorchFunctionMode):
    """Makes the values of parameters on the meta device, which have no memory, and keeps this rank's rows of them.

    Each parameter in turn is filled on the CPU as a whole; the next one replaces it in memory.
    """

    def __init__(self, ranks: Ranks) -> None:
        super().__init__()
        self._ranks = ranks
        self._rows: dict[torch.Tensor, torch.Tensor] = {}
        self._target: torch.Tensor | None = None
        self._values = torch.empty(0)

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        kwargs, name = dict(kwargs or {}), func.__name__
        target = args[0] if args else kwargs.get("tensor")
        fills = name in IN_PLACE or getattr(func, "__module__", None) == "torch.nn.init"
        changes = fills or (name.endswith("_") and not name.startswith("_") and name != "requires_grad_")
        if not changes or not isinstance(target, torch.Tensor) or not target.is_meta:
            return func(*args, **kwargs)
        if not fills or not isinstance(target, nn.Parameter):
            raise UserError(f"shard fsdp: {name} does not fill a whole parameter, as initialising in shards requires")
        if target is not self._target:
            self._keep()
            self._target, self._values = target, torch.empty(target.shape, dtype=target.dtype, device="cpu")
        with torch.no_grad():
            if args:
                func(self._values, *args[1:], **kwargs)
            else:
                func(**kwargs | {"tensor": self._values})
        return target

    def _keep(self) -> None:
        """Keep this rank's rows of the parameter that was filled last, and drop the rest."""
        if self._target is not None:
            first, end = rows_of(len(self._values), self._ranks.rank, self._ranks.world_size)
            self._rows[self._target] = self._values[first:end].clone()
        self._target, self._values = None, torch.empty(0)

    def rows_of(self, name: str, parameter: torch.Tensor) -> torch.Tensor:
        """This rank's rows of a parameter.

        Raises:
            UserError: it was not filled.
        """
        self._keep()
        if parameter not in self._rows:
            raise UserError(
                f"shard fsdp: {name} is not initialised by functions of torch.nn.init, which a sharded model needs to "
                "get the same values"
            )
        return self._rows[parameter]


def distribute(model: LanguageModel, device: torch.device, dtype: torch.dtype, ranks: Ranks) -> None:
    """Shard the blocks, and the parameters outside of them, over the ranks, in place.

    Gradients are summed, not averaged, because each rank's loss is its share of the mean over the batch.
    """
    if not dist.is_initialized():  # a single process
        dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    mesh = init_device_mesh(device.type, (ranks.world_size,))
    precision = MixedPrecisionPolicy(
        param_dtype=None if dtype == torch.float32 else dtype,
        reduce_dtype=torch.float32,
        cast_forward_inputs=False,  # the factors of the rotary embedding keep their precision
    )
    for module in (*model.blocks, model):
        sharded = fully_shard(module, mesh=mesh, mp_policy=precision)
        sharded.set_gradient_divide_factor(1.0)
        sharded.set_force_sum_reduction_for_comms(True)
        if ranks.several:
            sharded.set_custom_all_gather(_AllGather(ranks))
            sharded.set_custom_reduce_scatter(_ReduceScatter(ranks))
    if type(model).forward is LanguageModel.forward:

        def loss(self: LanguageModel, idx: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
            return self.head_loss(self.hidden(idx), targets)

        model.loss = types.MethodType(loss, model)  # type: ignore[method-assign]
        register_fsdp_forward_method(model, "loss")  # so that it gathers the weights, as calling the model does


class _Comm:
    """Allocates the memory of messages, through the interface that fully_shard expects."""

    def __init__(self, ranks: Ranks) -> None:
        self.ranks = ranks

    def allocate(self, size: Sequence[int], *, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
        return torch.empty(*size, dtype=dtype, device=device)


class _AllGather(_Comm):
    """Gathers like torch, but notices a rank that is gone or hangs."""

    def __call__(
        self, output_tensor: torch.Tensor, input_tensor: torch.Tensor, group: Any, async_op: bool = False
    ) -> None:
        self.ranks.together(lambda: dist.all_gather_single(output_tensor, input_tensor, group=group, async_op=True))


class _ReduceScatter(_Comm):
    """Sends each rank all summands of its rows, which it adds in the order of the tree (utils/training/lanes.py)."""

    def __call__(
        self, output_tensor: torch.Tensor, input_tensor: torch.Tensor, group: Any, op: Any, async_op: bool = False
    ) -> None:
        summands = torch.empty_like(input_tensor)
        self.ranks.together(lambda: dist.all_to_all_single(summands, input_tensor, group=group, async_op=True))
        parts = list(summands.chunk(self.ranks.world_size))
        while len(parts) > 1:
            pairs = [left.add_(right) for left, right in zip(parts[::2], parts[1::2], strict=False)]
            parts = pairs + parts[2 * len(pairs) :]
        output_tensor.copy_(parts[0])
