"""This module checks names given by users and suggests the nearest known names."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Sequence


def check_names(names: Iterable[str], known: Iterable[str], *, where: str) -> None:
    """Raise TypeError for the first unknown name, with the nearest known names."""
    known = list(known)
    for name in names:
        if name not in known:
            near = nearest(str(name), known)
            hint = f" Did you mean {either(map(repr, near))}?" if near else f" It has: {', '.join(sorted(known))}."
            raise TypeError(f"{where} has no parameter {name!r}.{hint}")


# Corresponding names in transformers' TrainingArguments, Lightning's Trainer and other training loops
_ELSEWHERE = {
    other: name
    for name, others in {
        "lr": "learning_rate",
        "epochs": "num_train_epochs num_epochs max_epochs n_epochs",
        "micro_batch_size": "per_device_train_batch_size",
        "gradient_accumulation_steps": "accumulate_grad_batches accumulation_steps accum_steps",
        "precision": "fp16 bf16 amp mixed_precision",
        "max_norm": "max_grad_norm gradient_clip_val grad_clip",
        "warmup_steps": "warmup_ratio",
        "schedule": "lr_scheduler_type lr_scheduler scheduler",
        "eval_every": "eval_steps val_check_interval",
        "log_every": "logging_steps log_every_n_steps",
        "save_every": "save_steps",
        "keep_last": "save_total_limit",
        "data_workers": "num_workers dataloader_num_workers",
        "nproc": "num_gpus n_gpus devices num_processes nproc_per_node",
        "best_metric": "metric_for_best_model",
        "resume": "resume_from_checkpoint",
        "time_limit": "max_time",
    }.items()
    for other in others.split()
}


def nearest(name: str, known: Sequence[str]) -> list[str]:
    """Return likely known names: another library's equivalent, a near spelling, or names containing `name`."""
    meant = _ELSEWHERE.get(name.lower().replace("-", "_"))
    if same := [other for other in known if other.lower().replace("-", "_") == meant]:
        return same
    slip = difflib.get_close_matches(name, known, n=1, cutoff=0.85)
    around = [other for other in known if len(name) > 3 and name in other][:3]
    return slip or around or difflib.get_close_matches(name, known, n=1)


def either(names: Iterable[str]) -> str:
    """ "a", "a or b", "a, b or c"."""
    *others, last = names
    return f"{', '.join(others)} or {last}" if others else last
