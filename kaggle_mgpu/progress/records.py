"""Read and write the records of a run in metrics.jsonl: one JSON object per line, oldest first.

    read(output_dir)      # every record
    running(records)      # whether the run is still active on this machine

Every record has a "kind" and a "step". Kinds: "start" (a session began: max_steps, unit, devices), "train", "eval",
"save", "gpus" (load of the GPUs), "note" (a text) and "stop" (a session ended). "time" is the run's seconds so far,
over all sessions; "spent" maps each use of the time since the previous such record to seconds. With several processes,
"rank0_loss", … are each rank's mean loss over its own part of the batch. These records suffice to show and plot a run.
"""

from __future__ import annotations

import json
import os
import socket
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path
from typing import Any

METRICS = "metrics.jsonl"
Record = dict[str, Any]
BOOKKEEPING = {"kind", "step", "samples", "epoch", "time", "seconds", "spent", "text", "time_left", "pid"}
"""Keys of a record that are not measurements."""


def read(output_dir: str | os.PathLike[str]) -> list[Record]:
    """Return all records of a run, oldest first; lines torn by a kill are left out."""
    path = Path(output_dir) / METRICS
    return parse(path.read_text(encoding="utf-8", errors="replace")) if path.is_file() else []


def parse(text: str, step: int = 0) -> list[Record]:
    """Return the valid records in a text; a record without a valid "step" gets the step of the record before.

    Args:
        step: the step of a first record that has no valid step.
    """
    records: list[Record] = []
    for line in text.splitlines():
        with suppress(ValueError, RecursionError):
            record = json.loads(line, parse_int=_int)
            if isinstance(record, dict) and _is_valid(record):
                found = record.get("step")
                if found is not None and abs(found) <= _MOST_STEPS:  # false for nan
                    step = int(found)
                records.append({**record, "step": step})
    return records


_MOST_STEPS = 10**15
_NUMBERS = (
    "step samples epoch time seconds time_left max_steps world_size replicas epochs pid "
    "loss lr grad_norm val_loss".split()
)
_TEXTS = ("unit", "device_line")


def _int(text: str) -> int:
    """Return a JSON integer; raise ValueError above 300 digits, since plots and the panel compute in floats."""
    if len(text) > 300:
        raise ValueError(f"a whole number of {len(text)} digits")
    return int(text)


def _is_valid(record: Record) -> bool:
    """Return whether the values that plots and panel use have the right types; a file from elsewhere may be invalid."""
    gpus = record.get("gpus", [])
    numbers = [record.get(name) for name in _NUMBERS]
    if not isinstance(gpus, list) or not all(isinstance(gpu, dict) for gpu in gpus):
        return False
    if not all(isinstance(record.get(name) or {}, dict) for name in ("metrics", "spent")):
        return False
    if not all(isinstance(record.get(name, ""), str) for name in _TEXTS):
        return False
    numbers += [value for gpu in gpus for value in gpu.values()]
    return all(value is None or isinstance(value, int | float) for value in numbers)


def comparable(records: Iterable[Record]) -> list[Record]:
    """Return the training and evaluation records without times and throughputs, to compare runs."""
    of_time = ("time", "seconds", "spent")
    return [
        {key: value for key, value in record.items() if key not in of_time and not key.endswith("_per_s")}
        for record in records
        if record.get("kind") in ("train", "eval")
    ]


def rewind(source: str | os.PathLike[str], target: Path, step: int, evaluated: int | None = None) -> list[Record]:
    """Atomically write the records of the folder `source` up to `step` to the file `target`; return these records.

    Args:
        step: the last step to keep; 0 keeps no records.
        evaluated: the step of the last evaluation to keep, since later evaluations will be repeated. None: `step`.
    """

    def counts(record: Record) -> bool:
        last = step if evaluated is None or record.get("kind") != "eval" else evaluated
        return isinstance(record.get("step", 0), int) and record.get("step", 0) <= last

    kept = [record for record in read(source) if counts(record)] if step else []
    temporary = target.with_name(f".writing-{target.name}")
    with open(temporary, "w", encoding="ascii", newline="\n") as file:
        file.writelines(json.dumps(record) + "\n" for record in kept)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, target)
    return kept


def encode(record: Record) -> tuple[Record, bytes]:
    """Return a record as plain values, and as a line of strict JSON with null for nan and infinity.

    Raises:
        TypeError: a value is neither JSON, nor a path, nor has `item()`.
    """
    text = json.dumps(record, default=_item)
    strict = json.loads(text, parse_constant=lambda constant: None)
    return json.loads(text), (json.dumps(strict, allow_nan=False) + "\n").encode("ascii")


def _item(value: Any) -> Any:
    """Convert a path to text, and a 0-d tensor or array to a number, for json."""
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    with suppress(AttributeError, ValueError, RuntimeError):  # item() of an array of several values fails
        return value.item()
    raise TypeError(
        f"a record holds numbers, strings, lists and dicts of them, paths and 0-d tensors, got "
        f"{type(value).__name__}: {value!r:.80}; convert it before it is recorded"
    )


def numbers(record: Record) -> dict[str, float]:
    """Return the measured numbers of a record, without bookkeeping, flags and texts."""
    return {
        key: value
        for key, value in record.items()
        if key not in BOOKKEEPING and isinstance(value, int | float) and not isinstance(value, bool)
    }


def texts(record: Record) -> dict[str, str]:
    """Return the texts of a record, without bookkeeping."""
    return {key: value for key, value in record.items() if key not in BOOKKEEPING and isinstance(value, str)}


def owner() -> Record:
    """Return the host and process id of this process, for a "start" record."""
    return {"host": socket.gethostname(), "pid": os.getpid()}


def running(records: list[Record]) -> bool:
    """Return whether the last session has begun, has not ended, and has a live process on this machine."""
    last = next((r for r in reversed(records) if r.get("kind") in ("start", "stop")), {})
    if last.get("kind") != "start" or last.get("host") != socket.gethostname():
        return False
    try:
        os.kill(int(last["pid"]), 0)
    except (KeyError, ValueError, OverflowError, ProcessLookupError):
        return False
    except PermissionError:
        pass  # alive, under another user
    return True
