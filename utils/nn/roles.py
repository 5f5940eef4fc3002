"""The role of each parameter, declared by its layer, so that nothing is guessed from names.

    self.proj = declare(Linear(config.n_embd, config.n_embd), weight=RESIDUAL)

Initialisation (`init_weights` in model.py), the optimizer's parameter groups and Muon's blocks (utils/optim/groups.py)
and the FLOP count (utils/nn/costs.py) follow from the roles. A parameter without a role keeps the initialisation of
its own module and is grouped by its shape.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal, TypeVar

from torch import nn

M = TypeVar("M", bound=nn.Module)

Group = Literal["matrices", "embeddings", "head", "vectors"]


@dataclass(frozen=True)
class Role:
    """What a parameter is for.

    name: selects the initialisation, see `init_weights` in model.py.
    group: the optimizer's parameter group.
    multiplies: every token is multiplied by the whole matrix, whereas it reads only one row of an embedding.
    rows: the rows of each of the matrices stacked in this one (queries, keys and values, say); empty: a single matrix.
    """

    name: str
    group: Group
    multiplies: bool = False
    rows: tuple[int, ...] = ()

    def stacked(self, *rows: int) -> Role:
        """The same role for several matrices stacked in one, with these numbers of rows."""
        return replace(self, rows=rows)


MATRIX = Role("matrix", "matrices", multiplies=True)
RESIDUAL = Role("residual projection", "matrices", multiplies=True)  # the last matrix before a residual addition
HEAD = Role("head", "head", multiplies=True)
EMBEDDING = Role("embedding", "embeddings")
TIED_EMBEDDING = Role("embedding", "embeddings", multiplies=True)  # also the output head
ZERO_EMBEDDING = Role("zero embedding", "embeddings")
BIAS = Role("bias", "vectors")
SCALE = Role("scale", "vectors")  # the weight of a norm
ADAPTER = Role("adapter", "matrices", multiplies=True)  # lora_a or lora_b, see utils/nn/lora.py

_ATTRIBUTE = "parameter_roles"  # the attribute of a module that holds {name of a parameter: role}


def declare(module: M, **roles: Role) -> M:
    """Declare the roles of parameters of `module` by name, replacing earlier ones; returns the module.

    A parameter that the module does not use (a bias that is None) may be named, too.
    """
    assert roles.keys() <= module._parameters.keys(), f"{type(module).__name__} has no such parameter: {roles}"
    vars(module)[_ATTRIBUTE] = vars(module).get(_ATTRIBUTE, {}) | roles
    return module


def declared_roles(model: nn.Module) -> dict[nn.Parameter, Role]:
    """The parameters of `model` that have a role, in the order of its modules.

    A parameter that several modules share has the role that the first of them declares.
    """
    roles: dict[nn.Parameter, Role] = {}
    for module in model.modules():
        for name, role in vars(module).get(_ATTRIBUTE, {}).items():
            parameter = module._parameters.get(name)
            if parameter is not None:
                roles.setdefault(parameter, role)
    return roles
