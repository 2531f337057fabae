"""The deepspeed strategy runs DeepSpeed's ZeRO, stages 1 to 3 with offload, under the training loop of `train`.

    launch(train, TrainConfig(strategy="deepspeed", deepspeed_config="zero3.json"), task)

zero3.json has DeepSpeed's settings: {"zero_optimization": {"stage": 3, "offload_optimizer": {"device": "cpu"}}}. A
DeepSpeed engine with the task's optimizer runs each backward pass and step. Checkpoints are assembled parameter by
parameter and have the same contents as under other strategies. On CPUs DeepSpeed 0.19 compiles an extension at its
first start, for a minute or two, and keeps the result in TORCH_EXTENSIONS_DIR.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from . import distributed
from .state import KERNEL, saved_state
from .strategy import Strategy

# Settings that the run decides; a file may hold "auto" or the run's own values for them
OURS = (
    "train_batch_size train_micro_batch_size_per_gpu gradient_accumulation_steps optimizer scheduler gradient_clipping "
    "fp16 bf16"
).split()


def settings(file: str | None, *, precision: str, max_norm: float | None) -> dict[str, Any]:
    """Return DeepSpeed's configuration: a file's settings (stage 2 without a file) with the run's own settings.

    "auto" anywhere in the file means the run's setting, or else DeepSpeed's default, as in transformers' Trainer. The
    run's optimizer, schedule and loss scaling replace the file's. The file may have // comments.

    Args:
        precision: fp32, fp16 or bf16.
        max_norm: for clipping gradients; None: no clipping.

    Raises:
        FileNotFoundError: the file is missing.
        ValueError: the file is not JSON, contradicts the run's settings, or has another stage than 1, 2 or 3.
    """
    found: Any = {"zero_optimization": {"stage": 2}}
    if file is not None:
        path = Path(file)
        if not path.is_file():
            raise FileNotFoundError(f"deepspeed_config: no such file: {path.resolve()}")
        try:
            found = json.loads(re.sub(r'//[^"\n]*$', "", path.read_text(encoding="utf-8"), flags=re.MULTILINE))
        except ValueError as error:
            raise ValueError(f"deepspeed_config: {path}: not valid JSON: {error}") from None
        if not isinstance(found, dict):
            raise ValueError(f"deepspeed_config: {path}: expected a mapping, got {type(found).__name__}")
    decided = {"gradient_clipping": max_norm or 0.0}
    decided |= {f"{kind}.enabled": precision == kind for kind in ("fp16", "bf16")}
    given = dict(_leaves({name: found[name] for name in OURS if name in found}))
    unused = [name for name in given if name.endswith(".type") or re.match(r"(fp16|bf16)\.(?!enabled$)", name)]
    wrong = [
        f"{name}={value!r}" + (f" (the run: {decided[name]!r})" if name in decided else "")
        for name, value in given.items()
        if name not in unused and (name not in decided or decided[name] != value)
    ]
    if wrong:
        raise ValueError(
            f"deepspeed_config: {file} sets {', '.join(wrong)}, which the run's own settings decide "
            f'(global_batch_size, micro_batch_size, precision, max_norm, lr, schedule). Write "auto" in the file.'
        )
    if unused and distributed.is_main():
        print(
            f"deepspeed_config: the run's optimizer, schedule and loss scaling replace {', '.join(unused)}", flush=True
        )
    stage = found.get("zero_optimization", {}).get("stage", 0)
    if stage not in (1, 2, 3):
        raise ValueError(f"deepspeed_config: {file}: zero_optimization.stage is {stage!r}: expected 1, 2 or 3")
    return {
        **_without_auto({name: value for name, value in found.items() if name not in OURS}),
        # with 1, DeepSpeed does not scale the loss: `train` scales the loss and sets the accumulation boundaries
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 1,
        "gradient_clipping": max_norm or 0.0,
        # loss scale 2^16 at first, halved at each overflow, as by torch's GradScaler
        "fp16": {"enabled": precision == "fp16", "initial_scale_power": 16, "hysteresis": 1},
        "bf16": {"enabled": precision == "bf16"},
        # use the task's optimizer unchanged
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "steps_per_print": 2**31,
    }


def _leaves(tree: dict[str, Any], above: str = "") -> Iterator[tuple[str, Any]]:
    """Yield (full name, value), such as ("fp16.enabled", True), for each value except "auto" in nested mappings."""
    for name, value in tree.items():
        if isinstance(value, dict):
            yield from _leaves(value, f"{above}{name}.")
        elif value != "auto":
            yield above + name, value


def _without_auto(tree: Any) -> Any:
    """Return nested mappings without the "auto" values."""
    if not isinstance(tree, dict):
        return tree
    return {name: _without_auto(value) for name, value in tree.items() if value != "auto"}


def require(device: torch.device) -> Any:
    """Import DeepSpeed and return the module.

    Raises:
        ImportError: DeepSpeed is not installed.
        RuntimeError: the C++ compiler that DeepSpeed needs on CPUs is missing.
    """
    os.environ.setdefault("DS_ACCELERATOR", device.type)
    if device.type == "cpu" and not (shutil.which("c++") or shutil.which("g++")):
        raise RuntimeError(
            "strategy 'deepspeed' on CPUs needs a C++ compiler, since DeepSpeed compiles an extension at its first "
            "start, and none was found: install g++ (apt-get install g++), or use strategy='fsdp'"
        )
    try:
        import deepspeed
    except ImportError as error:
        if error.name != "deepspeed":
            raise
        raise ImportError(
            "strategy 'deepspeed' needs the package `deepspeed`, which is not installed: pip install deepspeed (or "
            "kaggle_mgpu[deepspeed]). strategy='fsdp' distributes a model over GPUs without it."
        ) from None
    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    return deepspeed


class ZeRO(Strategy):
    """ZeRO runs one process per GPU and shards optimizer state (stage 1), gradients (2) and weights (3).

    Args:
        file: the path of DeepSpeed's JSON configuration; None: stage 2.
        max_norm: the same value as `step` will get; DeepSpeed needs the value at the start.
        averaged: whether ema_decay averages the weights; True raises ValueError under stage 3.

    Raises:
        ImportError, RuntimeError: DeepSpeed or a compiler is missing (see `require`).
        FileNotFoundError, ValueError: the file or its settings cannot be used (see `settings`).
    """

    name = "deepspeed"
    computes_alone = False

    def __init__(
        self, *args: Any, file: str | None, max_norm: float | None, averaged: bool = False, **kwargs: Any
    ) -> None:
        super().__init__(*args, **kwargs)
        self.deepspeed = require(self.device)
        self.settings = settings(file, precision=self.precision, max_norm=max_norm)
        self.stage = self.settings["zero_optimization"]["stage"]
        self.max_norm = max_norm
        if averaged and self.stage == 3:
            raise ValueError(
                "ema_decay with ZeRO stage 3: averaging needs whole weights on a rank, and stage 3 shards them. "
                "Use strategy='fsdp', stage 2, or ema_decay=None."
            )
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=False)  # DeepSpeed scales the loss itself

    def attach(self, optimizer: torch.optim.Optimizer) -> torch.optim.Optimizer:
        names = {parameter: name for name, parameter in self.model.named_parameters()}
        self.groups = [[names[parameter] for parameter in group["params"]] for group in optimizer.param_groups]
        self.shapes = {name: torch.empty_like(t, device="meta") for name, t in saved_state(self.model).items()}
        for tensor in [*self.model.parameters(), *self.model.buffers()]:
            dist.broadcast(tensor.detach(), src=0)  # DeepSpeed broadcasts only tensors in the optimizer
        self.engine, *_ = self.deepspeed.initialize(
            model=self.call, optimizer=optimizer, config=self.settings, dist_init_required=False
        )
        self.zero = self.engine.optimizer
        self.optimizer = optimizer
        return optimizer

    def micro_step(self, *, sync: bool) -> contextlib.AbstractContextManager[Any]:
        self.engine.set_gradient_accumulation_boundary(sync)
        return contextlib.nullcontext()

    def forward(self, batch: Any) -> Tensor:
        loss: Tensor = self.engine(batch)
        return loss

    def backward_from(self, loss: Tensor, start: float) -> None:
        self.engine.backward(loss * start)  # DeepSpeed always starts from 1

    def step(self, optimizer: torch.optim.Optimizer, *, max_norm: float | None) -> Tensor:
        """Let DeepSpeed clip and step; return the norm before clipping, or inf for a step skipped as not finite."""
        assert max_norm == self.max_norm, (max_norm, self.max_norm)
        self.engine.set_gradient_accumulation_boundary(True)
        self.engine.step()
        not_finite = bool(self.zero.overflow)
        self.skipped += not_finite
        self.skipped_in_a_row = (self.skipped_in_a_row + 1) * not_finite
        return torch.tensor(float("inf") if not_finite else float(self.engine.get_global_grad_norm()))

    def described(self) -> dict[str, Tensor]:
        return self.shapes

    def weights(self) -> dict[str, Tensor]:
        """Return {name: full tensor}; trainable weights have the optimizer's fp32 precision."""
        parameters = dict(self.model.named_parameters(remove_duplicate=False))
        own = self.model.state_dict()
        made: dict[Tensor, Tensor] = {}
        found = {}
        for name in self.shapes:
            if (parameter := parameters.get(name)) is None:
                found[name] = own[name].detach()
                continue
            if parameter not in made:  # tied weights stay one tensor
                made[parameter] = self._weight(parameter)
            found[name] = made[parameter]
        return found

    def _weight(self, parameter: nn.Parameter) -> Tensor:
        full = self.deepspeed.utils.safe_get_full_fp32_param(parameter) if parameter.requires_grad else None
        if full is None:  # frozen
            with self._gathered([parameter]):
                return parameter.detach().cpu().clone()
        return full.detach().to("cpu", torch.float32, copy=True)

    @contextlib.contextmanager
    def _gathered(self, parameters: list[nn.Parameter], writer: int | None = None) -> Iterator[None]:
        """Gather stage 3's parameters in a `with` block; only changes by rank `writer`, if given, are kept."""
        if self.stage == 3:
            with self.deepspeed.zero.GatheredParameters(parameters, modifier_rank=writer):
                yield
        else:
            yield

    def _partitions(self) -> list[Tensor]:
        """Return this rank's flat shards of the optimizer's weights."""
        flat = self.zero.fp32_partitioned_groups_flat if self.stage == 3 else self.zero.single_partition_of_fp32_groups
        return list(flat)

    def ungathered_state(self, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
        utils, parameters = self.deepspeed.utils, dict(self.model.named_parameters())
        moments: dict[str, dict[str, Any]] = {}
        states = [optimizer.state.get(piece, {}) for piece in self._partitions()]
        # before the first step no rank has any state
        known: dict[str, Any] = next((state for state in states if state), {})
        if known:
            self._link()
        is_moment = {key: value.numel() > 1 for key, value in known.items() if isinstance(value, Tensor)}
        plain = {key: value for key, value in known.items() if not is_moment.get(key)}
        for name in (name for group in self.groups for name in group if known):
            # the number of steps is one tensor here; other strategies have one per parameter
            moments[name] = {k: value.clone() if isinstance(value, Tensor) else value for k, value in plain.items()}
            for key in (key for key in known if is_moment.get(key)):
                full = utils.safe_get_full_optimizer_state(parameters[name], key)
                moments[name][key] = full.detach().to("cpu", copy=True)
            moments[name] = {key: moments[name][key] for key in known}
        groups = [
            {**{key: value for key, value in group.items() if key != "params"}, "params": names}
            for group, names in zip(optimizer.param_groups, self.groups, strict=True)
        ]
        return {
            "model": self.weights(),
            "optimizer": {"state": moments, "param_groups": groups},
            "scaler": self._scaler_state(),
            "skipped": int(self.skipped),
        }

    def _link(self) -> None:
        """Let stages 1 and 2 find each parameter's moments in the flat shards.

        DeepSpeed 0.19 makes these links once, after the first parameter group of the first step, and so misses the
        moments of all later groups.
        """
        if self.stage < 3:
            self.zero._hp_optimizer_states_linked = False
            self.zero._lazy_init_hp_params_optimizer_state()

    def _scaler_state(self) -> dict[str, Any]:
        """Return the loss scaler's state in GradScaler's format, computed from DeepSpeed's iteration counts."""
        if self.precision != "fp16":
            return {}
        scaler = self.zero.loss_scaler
        steps_without_overflow = (scaler.cur_iter - scaler.last_overflow_iter - 1) % scaler.scale_window
        return {
            "scale": float(scaler.cur_scale), "growth_factor": 2.0, "backoff_factor": 0.5,
            "growth_interval": scaler.scale_window, "_growth_tracker": steps_without_overflow,
        }  # fmt: skip

    @torch.no_grad()
    def load_full_state(self, optimizer: torch.optim.Optimizer, state: dict[str, Any]) -> None:
        theirs = [group["params"] for group in state["optimizer"]["param_groups"]]
        if theirs != self.groups:
            raise ValueError(
                f"the checkpoint's optimizer has other parameters, or in other groups, than this run's: groups of "
                f"{[len(names) for names in theirs]} then, of {[len(names) for names in self.groups]} now"
            )
        parameters = dict(self.model.named_parameters())
        buffers = dict(self.model.named_buffers())
        for name, value in state["model"].items():
            if name in buffers:
                buffers[name].copy_(value)
            elif name in parameters:
                self._put(parameters[name], value, None)
        for group, then in zip(optimizer.param_groups, state["optimizer"]["param_groups"], strict=True):
            group.update({key: value for key, value in then.items() if key not in ("params", *KERNEL)})
        moments: dict[str, dict[str, Any]] = state["optimizer"]["state"]
        if first := next(iter(moments.values()), {}):
            (name, *_) = moments
            for piece in self._partitions():
                optimizer.state[piece] = {
                    key: torch.zeros_like(piece) if value.shape == self.shape(name) else value.clone()
                    for key, value in first.items()
                }
            self._link()
            for name, values in moments.items():
                for key, value in values.items():
                    if value.shape == self.shape(name):
                        self._put(parameters[name], value, key)
        if self.stage == 3:
            for index in range(len(self._partitions())):
                self.zero._reassign_or_swap_out_partitioned_parameters(index)
            if persistent := self.zero.persistent_parameters:  # renew stage 3's full copies of small parameters
                persistent[0].partition(persistent)
                persistent[0].all_gather(persistent)
        else:
            self.zero.update_lp_params()
        if state["scaler"] and self.precision == "fp16":
            scaler = self.zero.loss_scaler
            scaler.cur_scale, scaler.cur_iter = state["scaler"]["scale"], 0
            scaler.last_overflow_iter = -1 - state["scaler"]["_growth_tracker"]
        self.skipped.fill_(state["skipped"])

    def shape(self, name: str) -> torch.Size:
        """Return the shape of a full weight."""
        return self.shapes[name].shape

    def _put(self, parameter: nn.Parameter, value: Tensor, moment: str | None) -> None:
        """Write a full weight, or its moment, into the ranks' shards."""
        utils = self.deepspeed.utils
        value = value.to(self.device, torch.float32 if parameter.requires_grad else parameter.dtype)
        if not parameter.requires_grad:
            with self._gathered([parameter], writer=0):
                if self.stage < 3 or distributed.is_main():
                    parameter.copy_(value)
        elif self.stage == 3:
            part = parameter.ds_tensor.numel()  # type: ignore[attr-defined]
            flat = nn.functional.pad(value.flatten(), (0, part * self.world_size - value.numel()))
            mine = flat[distributed.rank() * part :][:part]
            if moment is None:
                utils.safe_set_local_fp32_param(parameter, mine)
            else:
                utils.safe_set_local_optimizer_state(parameter, mine, moment)
        elif moment is None:
            utils.safe_set_full_fp32_param(parameter, value)
        else:
            utils.safe_set_full_optimizer_state(parameter, value, moment)
