"""`TrainConfig`: one flat frozen dataclass, the same names in a notebook, a YAML file and the command line.

    config = TrainConfig(global_batch_size=64, lr=3e-4, epochs=2)
    config = TrainConfig.load("run.yaml").replace(epochs=3)
    config = TrainConfig.from_dict(parameters)  # a misspelt name is a TypeError that suggests the right one

A recipe's config is a subclass with fields of its own. Values are checked when the config is made, by the type each
field is annotated with, so "1e-4" from papermill or YAML becomes a float and "fast" in an int field is an error that
names the field.
"""

from __future__ import annotations

import argparse
import collections
import dataclasses
import inspect
import json
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal, Self

from . import fields
from .names import check_names, either, nearest


def parse_duration(text: str | float) -> float:
    """Seconds in "11h30m", "45m", "90s", "1d", or a plain number of seconds.

    Raises:
        ValueError: the text is not a duration, or not above zero.
    """
    units = {"d": 86400.0, "h": 3600.0, "m": 60.0, "s": 1.0}
    body = str(text).strip().lower().replace(" ", "")
    if re.fullmatch(r"\d+(\.\d+)?", body):
        seconds = float(body)
    elif re.fullmatch(r"(\d+(\.\d+)?[dhms])+", body):
        seconds = sum(float(number) * units[unit] for number, _, unit in re.findall(r"(\d+(\.\d+)?)([dhms])", body))
    else:
        raise ValueError(f"not a duration: {text!r}. Write it like '11h30m', '45m', '90s' or a number of seconds.")
    if seconds <= 0:
        raise ValueError(f"a duration must be above zero, got {text!r}")
    return seconds


@dataclass(frozen=True)
class TrainConfig:
    """How to train. What to train is a `Task`'s business."""

    MAY_CHANGE: ClassVar[frozenset[str]] = frozenset(
        "strategy nproc gpu_ids cpu_offload deepspeed_config meta_init compile gradient_checkpointing "
        "global_batch_size micro_batch_size gradient_accumulation_steps data_workers epochs max_steps time_limit "
        "eval_every log_every save_every save_interval_minutes checkpoint_format keep_last resume output_dir "
        "tensorboard find_unused_parameters max_restarts hang_timeout_minutes collective_timeout_minutes "
        "nccl_p2p bucket_mb".split()
    )
    """Settings that may differ between the sessions of one run: where and how it runs, not what comes out. Of the
    batch sizes the resulting global one must stay: a checkpoint's stamp holds it. A subclass adds its own."""

    # Where it runs
    strategy: Literal["auto", "single", "dp", "ddp", "fsdp", "deepspeed"] = "auto"
    """single: one GPU; dp: one process, DataParallel; ddp: one process per GPU; fsdp: the same, with weights, gradients
    and optimizer state shared out among them, for models that do not fit otherwise; deepspeed: ZeRO, as its JSON file
    says; auto: ddp where nproc > 1."""
    nproc: int | Literal["auto"] = "auto"
    """Number of replicas on this machine: worker processes under ddp, GPUs under dp. auto: one per GPU; one on CPU."""
    gpu_ids: str | None = None
    """Which GPUs, as "0,1". None: all of them."""
    precision: Literal["auto", "fp32", "fp16", "bf16"] = "auto"
    """auto: bf16 from compute capability 8.0, fp16 with loss scaling from 7.0 (T4, V100), fp32 on CPU."""
    compile: bool = False
    """Compile the model with torch.compile."""
    cpu_offload: bool = False
    """Under fsdp, keep weights, gradients and optimizer state in main memory, and take the optimizer's step there."""
    deepspeed_config: str | None = None
    """Under deepspeed, a JSON file with its settings (zero_optimization: stage, offload, …). What the kit has settings
    for, sizes, precision, clipping, optimizer and schedule, it may not hold. None: ZeRO stage 2."""
    meta_init: bool = False
    """Under fsdp, build the weights on rank 0 alone; the others receive their parts: N times less main memory."""
    gradient_checkpointing: bool = False
    """Trade time for memory: recompute activations in backward (the model must offer gradient_checkpointing_enable)."""

    # The processes
    max_restarts: int = 0
    """How often a run whose worker was killed, crashed or hung is started again, from its newest checkpoint."""
    hang_timeout_minutes: float = 30.0
    """End a run in which no rank has got on for so long (no step, batch or line), with the stack of each."""
    collective_timeout_minutes: float = 60.0
    """How long a rank waits for the others in a collective. Above hang_timeout_minutes, whose error says more."""
    nccl_p2p: Literal["auto", "on", "off"] = "auto"
    """Whether NCCL may copy from GPU to GPU. auto: off for T4s, since Kaggle's pair has no peer access and NCCL's
    attempt can hang where a virtual machine claims it has: it then goes through shared memory, as it would anyway."""
    gradient_compression: Literal["none", "fp16"] = "none"
    """Under ddp, send gradients as fp16: half the bytes, rounded to three digits. `plan` says whether it would pay."""
    bucket_mb: int = 25
    """Under ddp, MiB of gradients sent at a time, while backward computes the next. The last one is waited for."""

    # How the batch is split: global = micro x replicas x accumulation. Give one, any two, or all three.
    global_batch_size: int | None = None
    """Samples per optimizer step over all GPUs. Keeps its meaning on 1, 2, 4 GPUs."""
    micro_batch_size: int | Literal["auto"] | None = None
    """Samples per forward pass on one GPU. auto: the most that fit, found by trying real steps on every GPU."""
    gradient_accumulation_steps: int | None = None
    """Forward/backward passes per optimizer step."""
    data_workers: int | Literal["auto"] = "auto"
    """Loader processes per rank. auto: the CPUs shared out, at most 4 in all; 0 for datasets fetched by the batch."""

    # How long
    epochs: int = 1
    """Passes over the training data. Ignored when max_steps is given."""
    max_steps: int | None = None
    """Optimizer steps to take in all, whatever that is in epochs."""
    time_limit: str | None = None
    """Stop in good order after this long ("11h30m"): save, write result.json with finished: false, return."""

    # The optimizer
    lr: float = 1e-3
    """Peak learning rate (for base_batch_size, when lr_scaling is not none)."""
    lr_scaling: Literal["none", "linear", "sqrt"] = "none"
    """Scale lr with global_batch_size / base_batch_size, or its square root."""
    base_batch_size: int = 256
    """The batch size that lr was chosen for; read only when lr_scaling is not none."""
    weight_decay: float = 0.1
    """AdamW's decoupled weight decay, applied to matrices only."""
    warmup_steps: int | float = 0
    """Steps of linear warm-up; below 1 it is a fraction of the run."""
    schedule: Literal["constant", "linear", "cosine", "cosine_restarts", "polynomial"] = "cosine"
    """Shape of the learning rate after warm-up."""
    schedule_cycles: int = 4
    """Number of cosine cycles of cosine_restarts."""
    schedule_power: float = 2.0
    """Exponent of polynomial."""
    min_lr: float = 0.0
    """Where the schedule ends."""
    find_unused_parameters: bool = False
    """Under ddp, allow for parameters that a step does not use (conditional branches); costs time in each step."""
    max_norm: float | None = 1.0
    """Clip the norm of the whole gradient to this. None: do not clip."""
    ema_decay: float | None = None
    """Average the weights with this decay; evaluation and the final weights then use the average."""

    # When to look and when to save
    eval_every: int | Literal["epoch", "end"] = "epoch"
    """Evaluate every so many steps, after each epoch, or at the end only."""
    log_every: int = 10
    """Steps between records of loss, learning rate and throughput."""
    save_every: int | None = None
    """Steps between checkpoints, beside those that save_interval_minutes asks for. None: by the clock alone."""
    save_interval_minutes: float = 30.0
    """Minutes between checkpoints."""
    checkpoint_format: Literal["full", "sharded"] = "full"
    """sharded: under fsdp each rank writes its own part of a checkpoint, which spares rank 0 the room for all of it. A
    run goes on from either, under any strategy. best/ and the final weights are one file in any case."""
    keep_last: int = 4
    """Checkpoints to keep, newest first."""
    best_metric: str = "loss"
    """The validation metric that decides which weights are kept in best/."""
    best_mode: Literal["min", "max"] = "min"
    """Whether best_metric is better when smaller or larger."""

    # The run
    resume: str = "auto"
    """auto: go on from the newest valid checkpoint of this run; never: start anew; or the path of a checkpoint."""
    output_dir: str = "run"
    """The run's folder: config, metrics, logs, checkpoints, weights, result."""
    seed: int = 1337
    """Seeds the weights, the order of samples and every other random choice."""
    tensorboard: bool = False
    """Write TensorBoard files (rank 0) into output_dir/tensorboard."""

    def __new__(cls, *values: Any, **named: Any) -> Self:
        # before __init__, whose "unexpected keyword argument" suggests nothing. Unpickling comes without names.
        accepted = inspect.signature(cls.__init__).parameters.values()
        if named and not any(parameter.kind is parameter.VAR_KEYWORD for parameter in accepted):
            check_names(named, [parameter.name for parameter in accepted][1:], where=cls.__name__)
        return super().__new__(cls)

    def __post_init__(self) -> None:
        for name, annotation in fields.types_of(type(self)).items():
            value = fields.parse(f"{type(self).__name__}.{name}", annotation, getattr(self, name))
            object.__setattr__(self, name, value)
        at_least = {
            "nproc": 1, "global_batch_size": 1, "micro_batch_size": 1, "gradient_accumulation_steps": 1,
            "data_workers": 0, "epochs": 1, "max_steps": 1, "lr": 0.0, "base_batch_size": 1, "weight_decay": 0.0,
            "warmup_steps": 0, "schedule_cycles": 1, "schedule_power": 0.0, "min_lr": 0.0, "eval_every": 1,
            "log_every": 1, "save_every": 1, "keep_last": 1, "save_interval_minutes": 0.0, "seed": 0,
            "bucket_mb": 1, "max_restarts": 0, "hang_timeout_minutes": 0.0, "collective_timeout_minutes": 0.0,
        }  # fmt: skip
        for name, least in at_least.items():
            value = getattr(self, name)
            # `not >=` rather than `<`, so that nan is refused too
            if isinstance(value, int | float) and not value >= least:
                raise ValueError(f"{type(self).__name__}.{name}: expected {least} or more, got {value!r}")
        if self.data_workers != "auto" and self.data_workers > MOST_DATA_WORKERS:
            raise ValueError(
                f"{type(self).__name__}.data_workers: expected at most {MOST_DATA_WORKERS} processes per rank, got "
                f"{self.data_workers!r}; one per core is plenty"
            )
        if self.max_norm is not None and not self.max_norm > 0:
            raise ValueError(
                f"{type(self).__name__}.max_norm: expected above 0, got {self.max_norm!r}; None switches clipping off"
            )
        if self.ema_decay is not None and not 0 < self.ema_decay < 1:
            raise ValueError(f"{type(self).__name__}.ema_decay: expected between 0 and 1, got {self.ema_decay!r}")
        if self.time_limit is not None:
            try:
                parse_duration(self.time_limit)
            except ValueError as error:
                raise ValueError(f"{type(self).__name__}.time_limit: {error}") from None
        for name, value in vars(self).items():
            # an empty path would be the current folder: a variable in a shell that was not set
            names = name in ("resume", "best_metric", "deepspeed_config", "model") or name.endswith(("_path", "_dir"))
            if names and isinstance(value, str) and not value.strip():
                raise ValueError(f"{type(self).__name__}.{name}: expected a name, got {value!r}")
        out = Path(self.output_dir)
        if file := next((path for path in (out, *out.parents) if os.path.isfile(path)), None):
            raise ValueError(f"{type(self).__name__}.output_dir: expected a folder, got {str(out)!r}: {file} is a file")

    @property
    def workers_wanted(self) -> int | None:
        """Worker processes this config asks for on one machine; None: as many as there are GPUs."""
        if self.strategy in ("single", "dp"):
            return 1
        return None if self.nproc == "auto" else int(self.nproc)

    # Dictionaries and files
    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Self:
        """Make a config from names and values.

        Raises:
            TypeError: a name that no field has; the message suggests the nearest.
            ValueError: a value that the field cannot take.
        """
        known = [field.name for field in dataclasses.fields(cls)]
        check_names(values, known, where=cls.__name__)
        return cls(**values)

    def to_dict(self) -> dict[str, Any]:
        """Plain values, as JSON gives them back: lists for tuples."""
        return {name: fields.plain(value) for name, value in dataclasses.asdict(self).items()}

    def replace(self, **changes: Any) -> Self:
        """A copy with some fields changed, checked like a new one."""
        return type(self).from_dict({**self.to_dict(), **changes})

    @classmethod
    def load(cls, path: str | Path) -> Self:
        """Read a .yaml, .yml or .json file, and the files that it includes.

        `include: base.yaml`, or a list of files, each relative to the file that names it: they are read first, in their
        order, a later one overriding an earlier one, and the file's own values override them all.

        Raises:
            FileNotFoundError: no such file.
            TypeError: a name that no field has.
            ValueError: not a mapping of names to values, not readable as YAML/JSON, a value that a field cannot take,
                or files that include each other.
        """
        settings = _read_settings(Path(path), ())
        try:
            return cls.from_dict(settings)
        except TypeError as error:  # whose settings these are
            raise TypeError(f"{path}: {error}") from None
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from None

    @classmethod
    def environment(cls, environ: Mapping[str, str] | None = None) -> dict[str, str]:
        """What the variables KAGGLE_MGPU_<FIELD> (KAGGLE_MGPU_MAX_STEPS=100) set, by field: text, not checked yet.

        Only the command line asks: in a notebook the parameters are what its cell says.

        Raises:
            TypeError: a variable that names no field and is none of the kit's own; the message suggests the nearest.
        """
        variables = os.environ if environ is None else environ
        known = {_PREFIX + field.name.upper(): field.name for field in dataclasses.fields(cls)}
        given = {
            name: value for name, value in variables.items() if name.startswith(_PREFIX) and name not in OF_THE_KIT
        }
        for name in given:
            if name not in known:
                # without what all of them begin with, by which any two are alike
                near = nearest(name.removeprefix(_PREFIX), [other.removeprefix(_PREFIX) for other in known])
                hint = (
                    f"Did you mean {either(_PREFIX + other for other in near)}?"
                    if near
                    else "Unset it, or correct its name."
                )
                raise TypeError(f"environment variable {name}: {cls.__name__} has no such field. {hint}")
        return {known[name]: value for name, value in given.items()}

    def diff(self, other: TrainConfig | Mapping[str, Any]) -> dict[str, tuple[Any, Any]]:
        """Fields whose values differ, as {name: (mine, the other's)}; a field one side lacks counts as None there."""
        mine = self.to_dict()
        theirs = other.to_dict() if isinstance(other, TrainConfig) else {n: fields.plain(v) for n, v in other.items()}
        names = [*mine, *(name for name in theirs if name not in mine)]
        return {n: (mine.get(n), theirs.get(n)) for n in names if mine.get(n) != theirs.get(n)}

    # The command line
    @classmethod
    def add_arguments(cls, parser: argparse.ArgumentParser) -> None:
        """One flag per field: `--global-batch-size 64`, `--compile` / `--no-compile`."""
        help_texts, annotations = fields.docstrings(cls), fields.types_of(cls)
        for field in dataclasses.fields(cls):
            annotation, text = annotations[field.name], help_texts.get(field.name, "")
            options: dict[str, Any] = {"dest": field.name, "default": argparse.SUPPRESS}
            default = field.default if field.default_factory is dataclasses.MISSING else field.default_factory()
            options["help"] = f"{text} (default: {default})".replace("%", "%%")
            if annotation is bool:
                options["action"] = argparse.BooleanOptionalAction
            else:
                options["metavar"] = fields.describe(annotation)
            parser.add_argument("--" + field.name.replace("_", "-"), **options)

    @classmethod
    def from_arguments(cls, namespace: argparse.Namespace, base: TrainConfig | Mapping[str, Any] | None = None) -> Self:
        """The config that the flags in `namespace` make, over `base` or the defaults."""
        known = {field.name for field in dataclasses.fields(cls)}
        given = {name: value for name, value in vars(namespace).items() if name in known}
        under = base.to_dict() if isinstance(base, TrainConfig) else dict(base or {})
        return cls.from_dict({**under, **given})


MOST_DATA_WORKERS = 256
"""Per rank. A slip of a few digits would otherwise start processes until the machine has no memory left."""
_PREFIX = "KAGGLE_MGPU_"
OF_THE_KIT = frozenset(f"{_PREFIX}{name}" for name in "DISPLAY KAGGLE_ROOT PROTOBUF QUIET SERVER SESSION_END".split())
"""Variables that set no field: where Kaggle's folders are, what is displayed and how, what env.fix() does."""


def _read_settings(path: Path, including: tuple[Path, ...]) -> dict[str, Any]:
    """The values in a file over those in the files that it includes."""
    if not path.is_file():
        by = f", included by {including[-1]}" if including else ""
        raise FileNotFoundError(f"config file not found: {path.resolve()}{by}")
    path = path.resolve()
    if path in including:
        chain = " -> ".join(file.name for file in (*including, path))
        raise ValueError(f"{path}: files include each other in a circle: {chain}")
    kind = "JSON" if path.suffix == ".json" else "YAML"
    try:
        text = path.read_text(encoding="utf-8")
        values = json.loads(text, object_pairs_hook=_each_once) if kind == "JSON" else _from_yaml(text)
    except Exception as error:  # YAML has errors of its own, and passes on ValueErrors of the values it makes
        raise ValueError(f"{path}: not valid {kind}: {error}") from None
    if not isinstance(values, Mapping):
        raise ValueError(f"{path}: expected a mapping of names to values, got {type(values).__name__}")
    own = dict(values)
    files = own.pop("include", [])
    files = [files] if isinstance(files, str) else files
    if not isinstance(files, list) or not all(isinstance(file, str) for file in files):
        raise ValueError(f"{path}: include: expected a file's name or a list of them, got {files!r}")
    merged: dict[str, Any] = {}
    for file in files:
        merged |= _read_settings(path.parent / file, (*including, path))
    return merged | own


def _from_yaml(text: str) -> Any:
    import yaml  # here, so that `import kaggle_mgpu.config` works before anything is installed

    top = yaml.compose(text, yaml.SafeLoader)
    if isinstance(top, yaml.MappingNode):
        _each_once([(name.value, value) for name, value in top.value if name.value != "<<"])
    return yaml.safe_load(text)


def _each_once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Of a name that stands there twice, both formats' readers keep the last value, and say nothing."""
    counts = collections.Counter(name for name, _ in pairs)
    if twice := [name for name, count in counts.items() if count > 1]:
        raise ValueError(f"{twice[0]!r} is set {counts[twice[0]]} times")
    return dict(pairs)
