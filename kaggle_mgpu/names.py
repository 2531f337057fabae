"""This module checks names given by users and suggests the nearest known names."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping, Sequence


def check_names(
    names: Iterable[str], known: Iterable[str], *, where: str, other_names: Mapping[str, str] | None = None
) -> None:
    """Raise TypeError for the first unknown name; the message begins with `where` and suggests the nearest known names.

    `other_names` is as in `nearest`.
    """
    known = list(known)
    for name in names:
        if name not in known:
            near = nearest(str(name), known, other_names)
            hint = f" Did you mean {either(map(repr, near))}?" if near else f" It has: {', '.join(sorted(known))}."
            hint += other_value(str(name), near)
            raise TypeError(f"{where} has no parameter {name!r}.{hint}")


# Corresponding names in transformers' TrainingArguments, Lightning's Trainer and other training loops
_OTHER_NAMES = {
    other: name
    for name, others in {
        "lr": "learning_rate base_lr max_lr",
        "epochs": "num_train_epochs num_epochs max_epochs n_epochs",
        "max_steps": "max_iters num_train_steps num_steps total_steps",
        "micro_batch_size": "per_device_train_batch_size batch_size_per_gpu",
        "gradient_accumulation_steps": "accumulate_grad_batches accumulation_steps accum_steps grad_accum "
        "grad_accum_steps",
        "strategy": "multi_gpu use_multi_gpu ddp dp distributed data_parallel distributed_backend",
        "precision": "fp16 bf16 amp mixed_precision",
        "compile": "torch_compile",
        "max_norm": "max_grad_norm gradient_clip_val grad_clip clip_grad_norm",
        "warmup_steps": "warmup_ratio warmup_epochs",
        "min_lr": "eta_min",
        "schedule_first_cycle": "t_0",
        "schedule_cycle_factor": "t_mult",
        "patience": "early_stopping_patience early_stopping",
        "min_delta": "early_stopping_threshold",
        "sync_batchnorm": "sync_bn sync_batch_norm",
        "prefetch_factor": "dataloader_prefetch_factor",
        "schedule": "lr_scheduler_type lr_scheduler scheduler",
        "eval_every": "eval_steps eval_interval val_interval val_check_interval check_val_every_n_epoch",
        "log_every": "logging_steps log_interval log_every_n_steps",
        "save_every": "save_steps save_interval checkpoint_every checkpoint_interval every_n_train_steps",
        "save_interval_minutes": "checkpoint_interval_minutes",
        "keep_last": "save_total_limit max_checkpoints max_to_keep",
        "output_dir": "save_dir out_dir log_dir logdir logging_dir checkpoint_dir ckpt_dir run_dir default_root_dir",
        "data_workers": "num_workers dataloader_num_workers num_workers_per_gpu",
        "nproc": "num_gpus n_gpus devices num_processes nproc_per_node world_size",
        "gpu_ids": "gpus device_ids",
        "best_metric": "metric_for_best_model monitor",
        "best_mode": "greater_is_better monitor_mode",
        "resume": "resume_from_checkpoint resume_from auto_resume ckpt_path",
        "seed": "random_state manual_seed",
        "time_limit": "max_time",
        "ema_decay": "use_ema ema",
        "collective_timeout_minutes": "nccl_timeout",
    }.items()
    for other in others.split()
}

# {name in other libraries: (corresponding name here, how to write the value here)}, where the two values differ in form
_OTHER_VALUE = {
    "warmup_epochs": ("warmup_steps", "Epochs are written '2 epochs'."),
    "batch_size": ("global_batch_size", "A size for each GPU is written 'per_gpu:32', for global_batch_size."),
}


def other_value(name: str, near: Iterable[str]) -> str:
    """Return " " and the sentence of `_OTHER_VALUE` for `name` if its corresponding name is among `near`, else ""."""
    meant, sentence = _OTHER_VALUE.get(name.lower().replace("-", "_"), ("", ""))
    return f" {sentence}" if meant in (one.lower().replace("-", "_") for one in near) else ""


def nearest(name: str, known: Sequence[str], other_names: Mapping[str, str] | None = None) -> list[str]:
    """Return likely known names: another library's equivalent, a near spelling, or names containing `name`.

    The list is empty if no name is near. Upper and lower case do not matter.

    Args:
        other_names: more names of other training scripts, and the known name of each.
    """
    name = name.lower()
    meant = (_OTHER_NAMES | dict(other_names or {})).get(name.replace("-", "_"))
    lowered = {other.lower(): other for other in known}
    if same := [other for low, other in lowered.items() if low.replace("-", "_") == meant]:
        return same
    # a lower cutoff for short names, where one wrong letter is a large share
    slip = difflib.get_close_matches(name, lowered, n=1, cutoff=0.75 if len(name) < 8 else 0.85)
    return [lowered[low] for low in slip or [low for low in lowered if len(name) > 4 and name in low][:3]]


def either(names: Iterable[str]) -> str:
    """Join names for a message: "a", "a or b", "a, b or c"."""
    *others, last = names
    return f"{', '.join(others)} or {last}" if others else last
