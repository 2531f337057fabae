"""Muon for the matrices of hidden layers, and AdamW for everything else, as one optimizer.

    groups = [{"params": matrices, "muon": True}, {"params": rest}]
    optimizer = Muon(groups, lr=1e-3, weight_decay=0.1)

Muon (Jordan et al. 2024, kellerjordan.github.io/posts/muon) replaces a matrix's momentum by an approximation of the
nearest matrix with orthonormal rows or columns, from five Newton-Schulz iterations. torch.optim.Muon iterates in
bfloat16, where a rounding difference in the gradient, as between one GPU and two, may change an update by 1 part in
250. After four steps, the weights trained on two replicas differed by 1e-3 from the weights trained on one. This class
iterates in float32, where the difference was 3e-7.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from torch.optim.adamw import adamw

from ..parallel import shards

COEFFICIENTS = (3.4445, -4.775, 2.0315)
"""a, b, c of the polynomial a x + b x^3 + c x^5, applied to the singular values per iteration (Jordan et al. 2024)."""
ITERATIONS = 5


def orthogonalised(matrices: Tensor) -> Tensor:
    """Return matrices (N, rows, columns) after Newton-Schulz iterations, with singular values near 1 (0.7 to 1.2)."""
    a, b, c = COEFFICIENTS
    tall = matrices.shape[1] > matrices.shape[2]
    x = matrices.mT if tall else matrices
    x = x / x.norm(dim=(1, 2), keepdim=True).clamp(min=1e-7)
    for _ in range(ITERATIONS):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.mT if tall else x


class Muon(torch.optim.Optimizer):
    """Muon for groups of matrices with "muon": True, and AdamW for the other groups.

    A matrix's update is scaled by 0.2 sqrt(max(rows, columns)), to the typical size of AdamW's updates, so that both
    kinds of groups share one learning rate and weight decay (Liu et al. 2025, arXiv 2502.16982, section 2.2). Under
    fsdp all ranks gather each matrix for its update.

    Args:
        momentum: for Muon's groups, with Nesterov's variant; 0.95 as in Jordan et al. 2024.
        betas, eps: for AdamW's groups.

    Raises:
        ValueError: a group with "muon": True has a parameter that is not a matrix.
    """

    def __init__(
        self,
        groups: Iterable[dict[str, Any]],
        lr: float = 1e-3,
        weight_decay: float = 0.1,
        momentum: float = 0.95,
        betas: tuple[float, float] = (0.9, 0.95),
        eps: float = 1e-8,
    ) -> None:
        defaults = {
            "lr": lr, "weight_decay": weight_decay, "muon": False, "momentum": momentum, "betas": betas, "eps": eps,
            "fused": True,
        }  # fmt: skip
        super().__init__(groups, defaults)
        for group in self.param_groups:
            group["fused"] &= all(p.device.type in ("cpu", "cuda") for p in group["params"])
            wrong = [tuple(p.shape) for p in group["params"] if p.ndim != 2]
            if group["muon"] and wrong:
                raise ValueError(
                    f"Muon: expected matrices, got a parameter of shape {wrong[0]}; give such parameters to AdamW"
                )

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> None:  # type: ignore[override]
        """Update the parameters that have a gradient."""
        assert closure is None, "Muon takes no closure"
        for group in self.param_groups:
            parameters = [p for p in group["params"] if p.grad is not None]
            (self._muon if group["muon"] else self._adamw)(group, parameters)

    def _muon(self, group: dict[str, Any], parameters: list[Tensor]) -> None:
        shapes: dict[tuple[int, ...], list[Tensor]] = {}
        for parameter in parameters:
            shapes.setdefault(tuple(parameter.shape), []).append(parameter)
        lr, momentum = group["lr"], group["momentum"]
        for shape, alike in shapes.items():  # matrices of one shape go through the iterations together
            updates = []
            for parameter in alike:
                state = self.state[parameter]
                if not state:
                    state["momentum_buffer"] = torch.zeros_like(parameter)
                average = state["momentum_buffer"].lerp_(parameter.grad, 1 - momentum)
                updates.append(shards.whole(parameter.grad.lerp(average, momentum)))  # type: ignore[union-attr]
            scale = 0.2 * max(shape) ** 0.5
            for parameter, update in zip(alike, orthogonalised(torch.stack(updates).float()), strict=True):
                rows = shards.local(parameter).mul_(1 - lr * group["weight_decay"])
                rows.add_(shards.rows_of(update, parameter), alpha=-lr * scale)

    def _adamw(self, group: dict[str, Any], parameters: list[Tensor]) -> None:
        for parameter in parameters:
            state = self.state[parameter]
            if not state:
                # as in torch.optim.AdamW: the fused kernel needs the step on the parameter's device
                state["step"] = torch.zeros((), device=parameter.device if group["fused"] else "cpu")
                state["exp_avg"], state["exp_avg_sq"] = torch.zeros_like(parameter), torch.zeros_like(parameter)
        states = [self.state[parameter] for parameter in parameters]
        gradients: list[Any] = [parameter.grad for parameter in parameters]
        first, second, steps = ([state[key] for state in states] for key in ("exp_avg", "exp_avg_sq", "step"))
        adamw(
            parameters, gradients, first, second, [], steps, fused=group["fused"], foreach=not group["fused"],
            beta1=group["betas"][0], beta2=group["betas"][1], lr=group["lr"], weight_decay=group["weight_decay"],
            eps=group["eps"], amsgrad=False, maximize=False,
        )  # fmt: skip
