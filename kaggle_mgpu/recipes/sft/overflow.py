"""Let modules whose numbers exceed fp16's 65504 compute in fp32, within a model that trains under fp16 autocast.

    names = mend(model, lambda: task.logits(model, batch))   # under autocast, in the precision of training

Kaggle's T4 has no bf16. Activations of Gemma 3 grow to 8e5 between its layers, so in fp16 its loss is nan.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map_only

BY_MODEL_TYPE = dict.fromkeys(
    ("gemma3", "gemma3_text", "gemma3n", "gemma3n_text", "gemma4", "gemma4_text"),
    ("embed_tokens", "act_fn", "down_proj", "post_attention_layernorm", "post_feedforward_layernorm"),
)
"""Model type -> the last part of the names of modules that overflow. With these modules in fp32, the residual sums
between layers are fp32 too.

The sources are vllm PR 17364 (the sums, Gemma 3) and unsloth-zoo PR 600 (down_proj and its input, Gemma 3 and 4).
"""


def mend(model: nn.Module, forward: Callable[[], Any] | None) -> list[str]:
    """Let the modules that overflow compute in fp32, and return their names.

    These are the modules of BY_MODEL_TYPE, and each module whose output in a trial is not finite although its inputs
    are.

    Args:
        forward: runs the trial, a forward pass under autocast; None: without a trial.
    """
    kinds = {getattr(getattr(m, "config", None), "model_type", "") for m in model.modules()}
    ends = {end for kind in kinds for end in BY_MODEL_TYPE.get(kind, ())}
    found = [name for name, module in model.named_modules() if name.rpartition(".")[2] in ends]
    for name in found:
        compute_in_fp32(model.get_submodule(name))
    return found + ([] if forward is None else _overflowing(model, forward))


@torch.no_grad()
def _overflowing(model: nn.Module, forward: Callable[[], Any]) -> list[str]:
    """Run `forward`; a module with finite inputs and a non-finite output computes in fp32 from then on."""
    names = {module: name for name, module in model.named_modules()}
    found: list[str] = []
    running: list[tuple[bool, int]] = []  # for each call in progress: are its inputs finite, len(found) at its start

    def before(module: nn.Module, args: Any, kwargs: Any) -> None:
        running.append((_is_finite((args, kwargs)), len(found)))

    def after(module: nn.Module, args: Any, kwargs: Any, output: Any) -> Any:
        sound, count = running.pop()
        if not sound or count < len(found) or _is_finite(output):  # count < len(found): the cause is within
            return None
        compute_in_fp32(module)
        again = module.forward(*args, **kwargs)  # so that the modules after this one get finite numbers
        found.append(names[module])
        return again

    hooks = [module.register_forward_pre_hook(before, with_kwargs=True) for module in names]
    hooks += [module.register_forward_hook(after, with_kwargs=True) for module in names]
    training = model.training
    model.eval()
    try:
        forward()
    finally:
        for hook in hooks:
            hook.remove()
        model.train(training)
        torch.clear_autocast_cache()  # else training would reuse casts of weights made under no_grad
    return found


def _is_finite(tree: Any) -> bool:
    tensors = (leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor) and leaf.is_floating_point())
    return all(bool(tensor.isfinite().all()) for tensor in tensors)


def compute_in_fp32(module: nn.Module) -> None:
    """Let a module compute in fp32 under autocast, and return fp32.

    Its weights become fp32, except 4-bit weights and those of an embedding, which the head may share.
    """
    if not isinstance(module, nn.Embedding):
        module.float()
    for inner in module.modules():
        if hasattr(inner, "compute_dtype"):  # of bitsandbytes
            inner.compute_dtype = torch.float32  # type: ignore[assignment]
    module.__class__ = _in_fp32(type(module))  # type: ignore[arg-type]


@cache
def _in_fp32(kind: type[nn.Module]) -> type[nn.Module]:
    """Return a subclass that computes in fp32.

    A `forward` set as an attribute of the module would, in every dp replica, compute with the original's weights.
    """

    def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        args, kwargs = _as_fp32(args), _as_fp32(kwargs)
        with torch.autocast("cuda", enabled=False), torch.autocast("cpu", enabled=False):
            return _as_fp32(kind.forward(self, *args, **kwargs))

    return type(kind.__name__, (kind,), {"forward": forward, "computes_in_fp32": True})


def _as_fp32(tree: Any) -> Any:
    return tree_map_only(Tensor, lambda t: t.float() if t.dtype in (torch.float16, torch.bfloat16) else t, tree)
