"""This module converts model and optimizer state to and from checkpoints, by parameter name, for all strategies."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

KERNEL = ("fused", "foreach", "capturable")
"""Options in an optimizer's groups that select a kernel. Loading a checkpoint keeps this machine's options."""


def saved_state(model: nn.Module) -> dict[str, Tensor]:
    """Return the part of a model's state_dict that checkpoints and weight files hold.

    A model's attribute `saved_names` (a set of names), if present, selects the tensors to save; Task.model must rebuild
    all others identically. In this way the adapters of a large model are saved without the model.
    """
    state = model.state_dict()
    names = getattr(model, "saved_names", None)
    return state if names is None else {name: tensor for name, tensor in state.items() if name in names}


def load_saved_state(model: nn.Module, state: dict[str, Tensor]) -> None:
    """Load a state from `saved_state`; the caller has compared names and shapes."""
    model.load_state_dict(state, strict=getattr(model, "saved_names", None) is None)


def named_optimizer_state(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """Return the optimizer's state keyed by parameter name, independent of wrapping and sharding."""
    names: dict[Tensor, str] = {parameter: name for name, parameter in model.named_parameters()}
    return {
        "state": {names[parameter]: dict(state) for parameter, state in optimizer.state.items()},
        "param_groups": [
            {
                **{key: value for key, value in group.items() if key != "params"},
                "params": [names[p] for p in group["params"]],
            }
            for group in optimizer.param_groups
        ],
    }


def load_named_optimizer_state(model: nn.Module, optimizer: torch.optim.Optimizer, state: dict[str, Any]) -> None:
    """Load a state from `named_optimizer_state`.

    Raises:
        ValueError: the state has other parameters, or other groups of parameters, than this optimizer.
    """
    names = {parameter: name for name, parameter in model.named_parameters()}
    mine = [[names[p] for p in group["params"]] for group in optimizer.param_groups]
    theirs = [group["params"] for group in state["param_groups"]]
    if differ := sorted({name for group in mine for name in group} ^ {name for group in theirs for name in group}):
        raise ValueError(f"the checkpoint's optimizer holds other parameters than this run's: {', '.join(differ[:5])}")
    if mine != theirs:
        raise ValueError(
            f"the checkpoint's optimizer has the parameters in other groups, or another order, than this run's: groups "
            f"of {[len(group) for group in theirs]} then, of {[len(group) for group in mine]} now"
        )
    number = {name: index for index, name in enumerate(name for group in mine for name in group)}
    groups = []
    for now, then in zip(optimizer.param_groups, state["param_groups"], strict=True):
        kernel = {key: now[key] for key in KERNEL if key in now}
        groups.append({**then, **kernel, "params": [number[name] for name in then["params"]]})
    optimizer.load_state_dict(
        {"state": {number[name]: values for name, values in state["state"].items()}, "param_groups": groups}
    )
