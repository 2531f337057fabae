"""The fsdp strategy shards weights, gradients and optimizer state over the ranks with torch's `fully_shard` (FSDP2).

Each block of the model is gathered just before its computation and released just after, in forward and backward. Each
rank gets the mean (under fp16 the sum) of the ranks' gradients for its shard. Checkpoints have the same contents and
names under all strategies, so a run can continue under any strategy. `choose_strategy` imports this module only when
needed, since the import takes two seconds.
"""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, FSDPModule, MixedPrecisionPolicy, OffloadPolicy, fully_shard

from . import distributed, shards
from .strategy import HALF, Call, Strategy


def repeated_blocks(model: nn.Module) -> list[nn.Module]:
    """Return a model's blocks: modules in a ModuleList or Sequential with another entry of the same class.

    Entries without parameters do not count. A block is not searched for smaller blocks, since all ranks must gather a
    block together, but may call different experts of a mixture of experts.
    """
    if isinstance(model, nn.ModuleList | nn.Sequential):
        entries = [child for child in model if any(True for _ in child.parameters())]
        often = Counter(type(child) for child in entries)
        if blocks := [child for child in entries if often[type(child)] > 1]:
            return list(dict.fromkeys(blocks))
    return list(dict.fromkeys(block for child in model.children() for block in repeated_blocks(child)))


@contextlib.contextmanager
def _integer_parameters() -> Iterator[None]:
    """Let `fully_shard` take integer parameters, such as 4-bit weights.

    torch 2.10 first makes each sharded parameter with requires_grad=True, an error for integers, and copies the
    original flag afterwards. torch 2.13 passes the original flag at once.
    """
    from torch.distributed.fsdp._fully_shard import _fsdp_param

    def parameter(data: Tensor, requires_grad: bool | None = None) -> nn.Parameter:
        return nn.Parameter(data, data.is_floating_point() if requires_grad is None else requires_grad)

    before = _fsdp_param.nn
    _fsdp_param.nn = SimpleNamespace(**{**vars(nn), "Parameter": parameter})  # type: ignore[assignment]
    try:
        yield
    finally:
        _fsdp_param.nn = before


class Sharded(Strategy):
    """Sharded runs one process per GPU, each with a shard of the weights, gradients and optimizer state.

    Parameters keep their type, usually fp32; under fp16 and bf16 they are gathered in half precision (see
    `_may_be_half`) and used under autocast, and gradients are summed in fp32. Gradients are exchanged in every
    micro-step, since accumulation before the exchange, as in ddp, would need memory for the full gradient.

    Args:
        units: returns the modules to gather one at a time, or None for `repeated_blocks`; other modules stay
            gathered throughout a step.
        cpu_offload: keep parameters, gradients and optimizer state in host memory between uses.
        meta_init: build the weights on rank 0 alone; other ranks receive their shards.
    """

    name = "fsdp"
    computes_alone = False

    def __init__(
        self,
        *args: Any,
        units: Callable[[nn.Module], list[nn.Module] | None] = lambda model: None,
        cpu_offload: bool = False,
        meta_init: bool = False,
        **kwargs: Any,
    ) -> None:
        super().__init__(*args, **kwargs)
        self.units, self.cpu_offload, self.meta_init = units, cpu_offload, meta_init
        if cpu_offload and self.scaler.is_enabled():
            # The CPU takes the optimizer step. A GradScaler on the GPU would send its scale and found_inf to the CPU
            # without waiting for their arrival (torch 2.13), so an infinite gradient might be applied.
            self.scaler = torch.amp.GradScaler("cpu")
            self.scaler.scale(torch.zeros(()))  # creates the scale's tensor on the CPU

    def building(self) -> contextlib.AbstractContextManager[Any]:
        if self.meta_init and not distributed.is_main():
            return torch.device("meta")
        return contextlib.nullcontext()

    def prepare(self, model: nn.Module) -> nn.Module:
        self.model = model
        self.call = self.parallel = Call(model, self.loss, self.metrics, self.precision, self.device.type)
        mesh = init_device_mesh(self.device.type, (self.world_size,))
        half = HALF.get(self.precision) if self._may_be_half(model) else None
        # inputs are not cast: autocast casts where needed, and targets or coordinates keep their precision
        policy = MixedPrecisionPolicy(
            param_dtype=half, reduce_dtype=torch.float32 if half else None, cast_forward_inputs=False
        )
        offload = CPUOffloadPolicy(pin_memory=self.device.type == "cuda") if self.cpu_offload else OffloadPolicy()
        units = self.units(model)
        # One unit at a time is copied to the device and sharded. `call` comes last, with the weights outside all units.
        for unit in [*(repeated_blocks(model) if units is None else units), self.call]:
            self._materialise(unit)
            with _integer_parameters():
                self._root: FSDPModule = fully_shard(unit, mesh=mesh, mp_policy=policy, offload_policy=offload)
            if self.precision == "fp16":  # sum gradients, as in ddp, so fp16 overflows in the same steps as on one GPU
                self._root.set_force_sum_reduction_for_comms(True)
                self._root.set_gradient_divide_factor(1.0)
                self.loss_multiplier = 1
        self.note_buffers()
        return model

    def _may_be_half(self, model: nn.Module) -> bool:
        """Return whether weights may be gathered in half precision; otherwise autocast casts them, as in ddp.

        torch's BatchNorm needs weights of the type of its statistics, fp32. On CPUs, where autocast skips
        normalisations, LayerNorm and GroupNorm need weights of their input's type. A module with a true attribute
        `computes_in_fp32` turns autocast off for itself, and needs fp32 weights.
        """
        on_cpu = (nn.LayerNorm, nn.GroupNorm) if self.device.type == "cpu" else ()
        kinds = (nn.modules.batchnorm._NormBase, *on_cpu)
        return not any(isinstance(m, kinds) or getattr(m, "computes_in_fp32", False) for m in model.modules())

    @torch.no_grad()
    def _materialise(self, unit: nn.Module) -> None:
        """Copy unsharded tensors of a unit to the device, with rank 0's values."""
        made: dict[Tensor, Tensor] = {}
        for module in unit.modules():
            for key, tensor in vars(module).items():
                if isinstance(tensor, Tensor) and tensor.is_meta:
                    raise ValueError(
                        f"meta_init=True, but {self._name_of(module)}.{key} is a tensor that is neither parameter nor "
                        f"buffer, so that only rank 0 knows its values. Make it a buffer (register_buffer), or set "
                        f"meta_init=False."
                    )
            for own in (module._parameters, module._buffers):
                for key, tensor in own.items():
                    if tensor is None or shards.is_sharded(tensor):
                        continue
                    if tensor not in made:
                        made[tensor] = self._from_rank_0(tensor)
                    own[key] = made[tensor]  # type: ignore[assignment]

    def _name_of(self, module: nn.Module) -> str:
        return next(name for name, found in self.model.named_modules() if found is module) or "the model"

    def _from_rank_0(self, tensor: Tensor) -> Tensor:
        if tensor.is_meta:
            there: Tensor = torch.empty_like(tensor, device=self.device)
            if isinstance(tensor, nn.Parameter):
                there = nn.Parameter(there, requires_grad=tensor.requires_grad)
        else:
            there = tensor
            if tensor.device != self.device:
                # as Module.to does: the object stays the same, and a quantised weight keeps its attributes
                tensor.data = tensor.to(self.device).data
        dist.broadcast(there.detach(), src=0)
        return there

    def forward(self, batch: Any) -> Tensor:
        return self.call(batch)

    def total_norm(self, gradients: list[Tensor]) -> Tensor:
        # torch's function exchanges a number per gradient, in a call that may deadlock on a CPU (see shards.whole)
        own = [shards.local(gradient) for gradient in gradients if shards.is_sharded(gradient)]
        others = [gradient for gradient in gradients if not shards.is_sharded(gradient)]
        total = super().total_norm(own).double().square()
        dist.all_reduce(total)
        total += super().total_norm(others).to(total.device).square()
        return total.sqrt().to(torch.promote_types(gradients[0].dtype, torch.float32))

    @torch.no_grad()
    def evaluate(self, batches: Iterator[Any]) -> dict[str, Any]:
        found = super().evaluate(batches)
        self._root.reshard()  # torch keeps the root gathered for a backward pass; evaluation has none
        return found

    def whole(self, tree: Any) -> Any:
        """Return the tree with gathered tensors in rank 0's host memory; other ranks get empty tensors."""
        main = distributed.is_main()
        found: dict[Any, Tensor] = {}

        def gathered(tensor: Tensor) -> Tensor:
            if not shards.is_sharded(tensor):
                return tensor
            # Tied weights are gathered once and stay one tensor. The address of a shard's memory identifies the weight:
            # torch pads shards, so a rank without rows has memory too, except for a tensor without elements.
            memory = shards.local(tensor).untyped_storage()
            key = (memory.data_ptr(), tuple(tensor.shape)) if memory.nbytes() else object()
            if key not in found:
                full = shards.whole(tensor.detach())
                found[key] = full.cpu() if main else torch.empty(0)
            return found[key]

        return shards.each(tree, gathered)

    def load_full_state(self, optimizer: torch.optim.Optimizer, state: dict[str, Any]) -> None:
        own, parameters = self.model.state_dict(), dict(self.model.named_parameters())

        def spread(value: Any, like: Tensor) -> Any:
            """Shard a full tensor like the tensor `like`; return any other value (a step count) unchanged."""
            fits = isinstance(value, Tensor | shards.Pieces) and shards.is_sharded(like) and value.shape == like.shape
            return shards.spread_like(value, like) if fits else value

        moments = {
            name: {key: spread(value, parameters[name]) for key, value in values.items()}
            for name, values in state["optimizer"]["state"].items()
            if name in parameters  # other names raise an error below
        }
        weights = {name: spread(value, own[name]) for name, value in state["model"].items()}
        optimizer_state = {**state["optimizer"], "state": moments}
        super().load_full_state(optimizer, {**state, "model": weights, "optimizer": optimizer_state})
