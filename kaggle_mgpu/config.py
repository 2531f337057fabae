"""`TrainConfig` is a flat frozen dataclass with the same names in a notebook, a YAML file and the command line.

    config = TrainConfig(global_batch_size=64, lr=3e-4, epochs=2)
    config = TrainConfig.load("run.yaml").replace(epochs=3)
    config = TrainConfig.from_dict(parameters)  # a misspelt name raises TypeError with a suggestion

A recipe's config is a subclass with more fields. Values are converted and checked by the annotated types: "1e-4" from
papermill or YAML becomes a float, and "fast" in an int field raises an error with the field's name.
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
from .names import check_names, either, nearest, other_value

Schedule = Literal["constant", "linear", "cosine", "cosine_restarts", "polynomial"]


def in_epochs(text: object) -> float | None:
    """Return 2.0 for "2 epochs", and None for anything else.

    >>> in_epochs("2 epochs"), in_epochs("0.5 epoch"), in_epochs(200)
    (2.0, 0.5, None)
    """
    found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*epochs?", str(text).strip())
    return float(found[1]) if found else None


@dataclass(frozen=True)
class TrainConfig:
    """A TrainConfig holds all settings of a run; a `Task` holds the model, the data and the loss."""

    MAY_CHANGE: ClassVar[frozenset[str]] = frozenset(
        "strategy nproc gpu_ids cpu_offload deepspeed_config meta_init compile gradient_checkpointing "
        "global_batch_size micro_batch_size gradient_accumulation_steps data_workers epochs max_steps time_limit "
        "eval_every log_every save_every save_interval_minutes checkpoint_format keep_last resume output_dir "
        "tensorboard find_unused_parameters patience min_delta prefetch_factor max_restarts hang_timeout_minutes "
        "collective_timeout_minutes nccl_p2p bucket_mb".split()
    )
    """Settings that may differ between the sessions of a run: where, how and how long training runs. The batch sizes
    may change, but not the resulting global batch size. A subclass adds its own names."""

    OTHER_NAMES: ClassVar[dict[str, str]] = {}
    """{name in another training script: field of this config}. Errors suggest the field. A subclass sets its own."""

    _derived: ClassVar[tuple[str, ...]] = ()
    """Fields of this config in which a subclass replaced "auto" by a value; `settings` leaves these fields out."""

    # Where it runs
    strategy: Literal["auto", "single", "dp", "ddp", "fsdp", "deepspeed"] = "auto"
    """single: one GPU; dp: one process, DataParallel; ddp: one process per GPU; fsdp: like ddp, with weights, gradients
    and optimizer state sharded, for large models; deepspeed: ZeRO; auto: ddp in several processes, else single."""
    nproc: int | Literal["auto"] = "auto"
    """Number of replicas on this machine: GPUs under dp, else worker processes. auto: one per GPU, at least one."""
    gpu_ids: str | None = None
    """The GPUs to use, as "0,1". None: all."""
    precision: Literal["auto", "fp32", "fp16", "bf16"] = "auto"
    """auto: bf16 from compute capability 8.0, fp16 with loss scaling from 7.0 (T4, V100), else fp32 (P100, CPU)."""
    compile: bool = False
    """Compile the model with torch.compile."""
    cpu_offload: bool = False
    """Under fsdp, keep weights, gradients and optimizer state in main memory, and run the optimizer on the CPU."""
    deepspeed_config: str | None = None
    """Under deepspeed, a JSON file with DeepSpeed's settings (zero_optimization: stage, offload, …). Batch sizes,
    precision, clipping, optimizer and schedule come from the run: leave them out of the file, or give "auto" or the
    run's values. None: ZeRO stage 2."""
    meta_init: bool = False
    """Under fsdp, build the weights on rank 0 alone, so that N ranks need 1/N of the main memory; other ranks receive
    their shards."""
    gradient_checkpointing: bool = False
    """Trade time for memory: recompute activations in backward (the model must offer gradient_checkpointing_enable)."""

    # The processes
    max_restarts: int = 0
    """Number of restarts from the newest checkpoint after a worker was killed, crashed or hung."""
    hang_timeout_minutes: float = 30.0
    """End a run in which no rank makes progress (step, batch, output) for this long, and show each rank's stack."""
    collective_timeout_minutes: float = 60.0
    """Time limit for a collective, an exchange between all ranks. Keep the limit above hang_timeout_minutes, whose
    error is more detailed."""
    nccl_p2p: Literal["auto", "on", "off"] = "auto"
    """Whether NCCL may copy directly between GPUs. auto: off for T4s, else on. Kaggle's T4s have no peer access, and
    NCCL can hang if a virtual machine claims otherwise. With off, copies go through shared memory."""
    gradient_compression: Literal["none", "fp16"] = "none"
    """Under ddp, send gradients as fp16: half the bytes, three significant digits. `plan` estimates the gain."""
    bucket_mb: int = 25
    """Under ddp, MiB of gradients sent at a time while backward continues. The default is torch's."""

    # How the batch is split: global = micro x replicas x accumulation. Give one, any two, or all three.
    global_batch_size: int | str | None = None
    """Samples per optimizer step over all GPUs, independent of the number of GPUs. "per_gpu:64": 64 for each
    replica of the model; the weights then depend on the number of GPUs, and a resumed run keeps the size of its first
    session. None: micro x replicas x accumulation, or 32 if micro_batch_size is None or auto."""
    micro_batch_size: int | Literal["auto"] | None = None
    """Samples per forward pass on one GPU. None: a GPU's share of the global batch, divided by
    gradient_accumulation_steps. auto: the largest size that fits, found by real steps on every GPU; under fsdp and
    deepspeed the whole share, halved when memory runs out."""
    gradient_accumulation_steps: int | None = None
    """Forward/backward passes per optimizer step. None: follows from the two sizes above, or 1."""
    data_workers: int | Literal["auto"] = "auto"
    """Loader processes per rank. auto: an equal share of at most 4 CPUs; 0 on one CPU, or for a dataset with a method
    `batch`, which makes a whole batch at once."""
    prefetch_factor: int = 2
    """Batches that each loader process fetches ahead."""

    # How long
    epochs: int = 1
    """Passes over the training data. Ignored when max_steps is given."""
    max_steps: int | None = None
    """Optimizer steps in all, in place of epochs."""
    time_limit: str | None = None
    """Stop after this time ("11h30m"): save, write result.json with finished: false, and return."""

    # The optimizer
    lr: float = 1e-3
    """Peak learning rate; with lr_scaling, the peak at base_batch_size."""
    lr_scaling: Literal["none", "linear", "sqrt"] = "none"
    """Multiply lr by global_batch_size / base_batch_size (linear, Goyal et al. 2017), or by its square root (sqrt)."""
    base_batch_size: int = 256
    """The batch size that lr was chosen for; read only when lr_scaling is not none."""
    weight_decay: float = 0.1
    """AdamW's decoupled weight decay; vectors, biases and normalisation layers do not decay."""
    warmup_steps: int | float | str = 0
    """Steps of linear warm-up; below 1, a fraction of the run; or epochs, as "2 epochs"."""
    schedule: Schedule = "cosine"
    """Shape of the learning rate after warm-up."""
    schedule_cycles: int = 4
    """Number of cosine cycles of cosine_restarts, where schedule_first_cycle is None."""
    schedule_first_cycle: int | str | None = None
    """T_0 of cosine_restarts: steps of the first cycle, or epochs, as "10 epochs". None: schedule_cycles decides."""
    schedule_cycle_factor: int = 1
    """T_mult of cosine_restarts: each cycle is this many times as long as the cycle before."""
    schedule_power: float = 2.0
    """Exponent of the polynomial schedule."""
    min_lr: float = 0.0
    """Final learning rate of the schedule."""
    sync_batchnorm: Literal["auto", "off"] = "auto"
    """auto: BatchNorm layers compute their statistics over the micro-batches of all processes. off: each process
    computes its own statistics, which saves two exchanges per layer. find_unused_parameters implies off, since a rank
    may then skip a layer in which other ranks wait."""
    find_unused_parameters: bool = False
    """Under ddp, allow parameters unused in a step (conditional branches), at the cost of time in each step."""
    max_norm: float | None = 1.0
    """Clip the norm of the whole gradient to this. None: do not clip."""
    ema_decay: float | None = None
    """Average the weights with this decay; evaluation and the final weights then use the average."""

    # Evaluation, logging and checkpoints
    eval_every: int | Literal["epoch", "end"] = "epoch"
    """Evaluate after this many steps, after each epoch, or only at the end."""
    log_every: int = 10
    """Steps between records of loss, learning rate and throughput."""
    save_every: int | None = None
    """Steps between checkpoints, in addition to save_interval_minutes. None: only save_interval_minutes."""
    save_interval_minutes: float = 30.0
    """Minutes between checkpoints."""
    checkpoint_format: Literal["full", "sharded"] = "full"
    """sharded: under fsdp each rank writes its own part of a checkpoint, so rank 0 needs less memory. A run can resume
    from both formats under any strategy. best/ and the final weights are always one file."""
    keep_last: int = 4
    """Checkpoints to keep, newest first."""
    best_metric: str = "loss"
    """The validation metric by which the weights in best/ are selected."""
    best_mode: Literal["min", "max"] = "min"
    """Whether best_metric is better when smaller or larger."""
    patience: int | None = None
    """End the run after this many evaluations in a row without an improvement of best_metric. None: never."""
    min_delta: float = 0.0
    """For patience, best_metric improves if it gets better by more than this."""

    # The run
    resume: str = "auto"
    """auto: resume from the newest valid checkpoint of this run; never: start anew; or the path of a checkpoint."""
    output_dir: str = "run"
    """The run's folder: config, metrics, logs, checkpoints, weights, result."""
    seed: int = 1337
    """Seeds the weights, the order of samples and every other random choice."""
    tensorboard: bool = False
    """Write TensorBoard files (rank 0) into output_dir/tensorboard."""

    def __new__(cls, *values: Any, **named: Any) -> Self:
        # Names are checked here, since the error of __init__ suggests no known name. Unpickling passes no names.
        accepted = inspect.signature(cls.__init__).parameters.values()
        if named and not any(parameter.kind is parameter.VAR_KEYWORD for parameter in accepted):
            names = [parameter.name for parameter in accepted][1:]
            check_names(named, names, where=cls.__name__, other_names=cls.OTHER_NAMES)
        return super().__new__(cls)

    def __post_init__(self) -> None:
        for name, annotation in fields.types_of(type(self)).items():
            value = fields.parse(f"{type(self).__name__}.{name}", annotation, getattr(self, name))
            object.__setattr__(self, name, value)
        at_least = {
            "nproc": 1, "global_batch_size": 1, "micro_batch_size": 1, "gradient_accumulation_steps": 1,
            "data_workers": 0, "epochs": 1, "max_steps": 1, "lr": 0.0, "base_batch_size": 1, "weight_decay": 0.0,
            "warmup_steps": 0, "schedule_cycles": 1, "schedule_first_cycle": 1, "schedule_cycle_factor": 1,
            "prefetch_factor": 1, "patience": 1, "min_delta": 0.0, "min_lr": 0.0, "eval_every": 1,
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
        for name, hint in (("max_norm", "; None switches clipping off"), ("schedule_power", "")):
            if (value := getattr(self, name)) is not None and not value > 0:
                raise ValueError(f"{type(self).__name__}.{name}: expected above 0, got {value!r}{hint}")
        if self.ema_decay is not None and not 0 < self.ema_decay < 1:
            raise ValueError(f"{type(self).__name__}.ema_decay: expected between 0 and 1, got {self.ema_decay!r}")
        for name in ("warmup_steps", "schedule_first_cycle"):
            if isinstance(value := getattr(self, name), str) and in_epochs(value) is None:
                raise ValueError(
                    f"{type(self).__name__}.{name}: expected a number of steps, or epochs as '2 epochs', got {value!r}"
                )
        parsers = {"time_limit": fields.parse_duration, "global_batch_size": fields.parse_per_gpu}
        for name, parse in parsers.items():
            if isinstance(value := getattr(self, name), str):
                try:
                    parsed = parse(value)
                except ValueError as error:
                    raise ValueError(f"{type(self).__name__}.{name}: {error}") from None
                if name == "global_batch_size":
                    object.__setattr__(self, name, f"per_gpu:{parsed}")  # one spelling, without spaces
        for name, value in vars(self).items():
            # an empty path, as from an unset shell variable, would mean the current folder
            names = name in ("resume", "best_metric", "deepspeed_config", "model") or name.endswith(("_path", "_dir"))
            if names and isinstance(value, str) and not value.strip():
                raise ValueError(f"{type(self).__name__}.{name}: expected a name, got {value!r}")
        out = Path(self.output_dir)
        if file := next((path for path in (out, *out.parents) if os.path.isfile(path)), None):
            raise ValueError(f"{type(self).__name__}.output_dir: expected a folder, got {str(out)!r}: {file} is a file")

    @property
    def workers_wanted(self) -> int | None:
        """The number of worker processes on one machine; None: one per GPU."""
        if self.strategy in ("single", "dp"):
            return 1
        return None if self.nproc == "auto" else int(self.nproc)

    # Dictionaries and files
    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Self:
        """Make a config from names and values.

        Raises:
            TypeError: a name is not a field; the message suggests the nearest field.
            ValueError: a value is invalid for its field.
        """
        names = [field.name for field in dataclasses.fields(cls)]
        check_names(values, names, where=cls.__name__, other_names=cls.OTHER_NAMES)
        return cls(**values)

    def to_dict(self) -> dict[str, Any]:
        """Return the value of each field by name, with lists in place of tuples."""
        return {name: fields.plain(value) for name, value in dataclasses.asdict(self).items()}

    @classmethod
    def defaults(cls) -> dict[str, Any]:
        """Return the default of each field that has one, with lists in place of tuples."""
        return {
            f.name: fields.plain(f.default) for f in dataclasses.fields(cls) if f.default is not dataclasses.MISSING
        }

    def settings(self) -> dict[str, Any]:
        """Return `to_dict` without the `_derived` fields."""
        return {name: value for name, value in self.to_dict().items() if name not in self._derived}

    def replace(self, **changes: Any) -> Self:
        """Return a checked copy with some fields changed. Raises as `from_dict`."""
        return type(self).from_dict({**self.settings(), **changes})

    @classmethod
    def load(cls, path: str | Path) -> Self:
        """Read a .yaml, .yml or .json file with its included files.

        `include: base.yaml`, or a list of files relative to the including file, is read first; later files override
        earlier files, and the file's own values override all.

        Raises:
            FileNotFoundError: a file is missing.
            TypeError: a name is not a field.
            ValueError: a file is not a mapping or not valid YAML/JSON, a value is invalid for its field, or files
                include each other.
        """
        settings = _read_settings(Path(path), ())
        try:
            return cls.from_dict(settings)
        except (TypeError, ValueError) as error:
            kind = TypeError if isinstance(error, TypeError) else ValueError  # subclasses may need other arguments
            raise kind(f"{path}: {error}") from None

    @classmethod
    def environment(cls, environ: Mapping[str, str] | None = None) -> dict[str, str]:
        """Return the texts of the variables KAGGLE_MGPU_<FIELD> (KAGGLE_MGPU_MAX_STEPS=100) by field, unchecked.

        Only the command line uses these variables, not notebooks.

        Raises:
            TypeError: a variable matches no field and is not in `NOT_FIELDS`; the message suggests the nearest field.
        """
        variables = os.environ if environ is None else environ
        known = {_PREFIX + field.name.upper(): field.name for field in dataclasses.fields(cls)}
        given = [name for name in variables if name.startswith(_PREFIX) and name not in NOT_FIELDS]
        if unknown := next((name for name in given if name not in known), None):
            # compared without the prefix, since sharing it makes any two names similar
            short = unknown.removeprefix(_PREFIX)
            near = nearest(short, [name.removeprefix(_PREFIX) for name in known], cls.OTHER_NAMES)
            meant = either(_PREFIX + name for name in near) if near else ""
            hint = f"Did you mean {meant}?{other_value(short, near)}" if near else "Unset it, or correct its name."
            raise TypeError(f"environment variable {unknown}: {cls.__name__} has no such field. {hint}")
        return {known[name]: variables[name] for name in given}

    def diff(self, other: TrainConfig | Mapping[str, Any]) -> dict[str, tuple[Any, Any]]:
        """Return {name: (own value, other value)} for all different fields; a missing field counts as None."""
        mine = self.to_dict()
        theirs = other.to_dict() if isinstance(other, TrainConfig) else {n: fields.plain(v) for n, v in other.items()}
        names = [*mine, *(name for name in theirs if name not in mine)]
        return {n: (mine.get(n), theirs.get(n)) for n in names if mine.get(n) != theirs.get(n)}

    # The command line
    @classmethod
    def add_arguments(cls, parser: argparse.ArgumentParser) -> None:
        """Add a flag per field: `--global-batch-size 64`, `--compile` / `--no-compile`."""
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
        """Make a config from the flags in `namespace`, which override `base` or the defaults. Raises as `from_dict`."""
        known = {field.name for field in dataclasses.fields(cls)}
        given = {name: value for name, value in vars(namespace).items() if name in known}
        under = base.to_dict() if isinstance(base, TrainConfig) else dict(base or {})
        return cls.from_dict({**under, **given})


MOST_DATA_WORKERS = 256
"""Limit per rank, so that a mistyped number does not exhaust the machine's memory."""
_PREFIX = "KAGGLE_MGPU_"
NOT_FIELDS = frozenset(f"{_PREFIX}{name}" for name in "DISPLAY KAGGLE_ROOT PROTOBUF QUIET SERVER SESSION_END".split())
"""Environment variables of this package that set no field."""


def _read_settings(path: Path, including: tuple[Path, ...]) -> dict[str, Any]:
    """Return the values in a file, merged over the values in its included files."""
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
    except Exception as error:  # YAML raises its own errors and ValueErrors
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
    """Return the pairs as a dict; raise ValueError for a repeated name, since JSON and YAML readers keep the last."""
    counts = collections.Counter(name for name, _ in pairs)
    if twice := [name for name, count in counts.items() if count > 1]:
        raise ValueError(f"{twice[0]!r} is set {counts[twice[0]]} times")
    return dict(pairs)
