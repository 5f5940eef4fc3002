"""Convert the state of any torch optimizer to tensors and JSON, and back."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, Protocol

import torch

from utils.checkpoints.folder import CheckpointError


class Named(Protocol):
    """A module, or any other object with named parameters."""

    def named_parameters(self) -> Iterable[tuple[str, torch.Tensor]]: ...


def flatten_optimizer(model: Named, optimizer: torch.optim.Optimizer) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """Split the state of an optimizer into its tensors, named `parameter/key`, and everything else as JSON.

    In the JSON, {"tensor": name} stands for a tensor.

    Raises:
        ValueError: the optimizer has a parameter that the model does not have, or a value that JSON cannot express.
    """
    names: dict[torch.Tensor, str] = {parameter: name for name, parameter in model.named_parameters()}
    tensors: dict[str, torch.Tensor] = {}

    def encode(value: Any, name: str) -> Any:
        if isinstance(value, torch.Tensor):
            tensors[name] = value
            return {"tensor": name}
        if isinstance(value, Mapping):
            return {key: encode(item, f"{name}/{key}") for key, item in value.items()}
        if isinstance(value, list | tuple):
            return [encode(item, f"{name}/{index}") for index, item in enumerate(value)]
        if value is None or isinstance(value, bool | int | float | str):
            return value
        raise ValueError(f"the optimizer's {name} is a {type(value).__name__}, which a checkpoint cannot hold")

    def name_of(parameter: torch.Tensor) -> str:
        if parameter not in names:
            raise ValueError("the optimizer has a parameter that is not the model's")
        return names[parameter]

    state = {name_of(parameter): encode(values, name_of(parameter)) for parameter, values in optimizer.state.items()}
    groups = [
        {
            "params": [name_of(parameter) for parameter in group["params"]],
            "settings": encode({k: v for k, v in group.items() if k != "params"}, f"groups/{index}"),
        }
        for index, group in enumerate(optimizer.param_groups)
    ]
    return tensors, {"class": type(optimizer).__name__, "groups": groups, "state": state}


def restore_optimizer(
    model: Named,
    optimizer: torch.optim.Optimizer,
    tensors: Mapping[str, torch.Tensor],
    structure: Mapping[str, Any],
    *,
    keep_settings: bool = False,
) -> None:
    """Load the state that `flatten_optimizer` returned for an optimizer like this one.

    Args:
        keep_settings: keep the settings of the groups (weight decay, betas), and load only the state.

    Raises:
        CheckpointError: the state belongs to another class of optimizer, or to other parameter groups.
    """
    names: dict[torch.Tensor, str] = {parameter: name for name, parameter in model.named_parameters()}
    groups = [[names[parameter] for parameter in group["params"]] for group in optimizer.param_groups]
    if structure["class"] != type(optimizer).__name__:
        raise CheckpointError(
            f"the checkpoint has the state of {structure['class']}, this run trains with {type(optimizer).__name__}"
        )
    if groups != [group["params"] for group in structure["groups"]]:
        raise CheckpointError(
            "the parameter groups of the optimizer are not those of the checkpoint, which was saved by another version "
            "or with another optimizer"
        )

    def decode(value: Any) -> Any:
        if isinstance(value, dict) and set(value) == {"tensor"}:
            # Tensors mapped from a file may be unaligned, and torch sums unaligned memory in another order.
            return tensors[value["tensor"]].clone()
        if isinstance(value, dict):
            return {key: decode(item) for key, item in value.items()}
        return [decode(item) for item in value] if isinstance(value, list) else value

    saved = {name: decode(values) for name, values in structure["state"].items()}
    order = [name for group in groups for name in group]
    settings = [{key: v for key, v in group.items() if key != "params"} for group in optimizer.param_groups]
    if not keep_settings:
        for own, group in zip(settings, structure["groups"], strict=True):
            own |= {
                key: tuple(value) if isinstance(own.get(key), tuple) else value
                for key, value in decode(group["settings"]).items()
            }
    first = 0
    for own, members in zip(settings, groups, strict=True):
        own["params"] = list(range(first, first + len(members)))
        first += len(members)
    numbered = {index: saved[name] for index, name in enumerate(order) if name in saved}
    optimizer.load_state_dict({"state": numbered, "param_groups": settings})
    for parameter, name in names.items():  # load_state_dict casts to the dtype of the parameter, which changes bits
        if name in saved:
            state = optimizer.state[parameter]
            state.update({key: _with_types(value, state[key]) for key, value in saved[name].items()})


def _with_types(saved: Any, loaded: Any) -> Any:
    """The values that torch has loaded, on their device, but with the dtypes that were saved."""
    if isinstance(saved, torch.Tensor):
        return loaded if loaded.dtype == saved.dtype else saved.to(loaded.device)
    if isinstance(saved, dict):
        return {key: _with_types(value, loaded[key]) for key, value in saved.items()}
    if isinstance(saved, list):
        return [_with_types(value, other) for value, other in zip(saved, loaded, strict=True)]
    return loaded
