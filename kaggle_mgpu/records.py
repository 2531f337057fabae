"""The records of a run, as they stand in its metrics.jsonl: one JSON object a line, oldest first.

    read(output_dir)      # every record
    running(records)      # does that run go on, as far as can be told from here?

What a record holds depends on its "kind": "start" (of a session: what the run is), "train", "eval", "save", "gpus"
(how busy they were), "note" (a text) and "stop" (how the session ended). Each has the "step" it belongs to. "time" is
seconds of the run over all sessions; "spent" is where those since the record before went. Nothing else is needed to
show a run again, or to draw it.
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
# Bookkeeping of a record, as against what was measured.
FACTS = {"kind", "step", "samples", "epoch", "time", "seconds", "spent", "text", "time_left", "pid"}


def read(output_dir: str | os.PathLike[str]) -> list[Record]:
    """All records of a run, oldest first; [] if there are none yet. Lines torn by a kill are left out."""
    path = Path(output_dir) / METRICS
    return parse(path.read_text(encoding="utf-8", errors="replace")) if path.is_file() else []


def parse(text: str, step: int = 0) -> list[Record]:
    """The records among these lines, each with a whole "step": where it has none, that of the record before it.

    Args:
        step: that of the record before the first.
    """
    records: list[Record] = []
    for line in text.splitlines():
        with suppress(ValueError, RecursionError):
            record = json.loads(line, parse_int=_int)
            if isinstance(record, dict) and _sound(record):
                found = record.get("step")
                if found is not None and abs(found) <= _MOST_STEPS:  # nan is not
                    step = int(found)
                records.append({**record, "step": step})
    return records


_MOST_STEPS = 10**15
_NUMBERS = (
    "step samples epoch time seconds time_left max_steps world_size epochs pid loss lr grad_norm val_loss".split()
)
_TEXTS = ("unit", "device_line")


def _int(text: str) -> int:
    """A whole number that is within a float's range, as what shows and draws it takes it to be."""
    if len(text) > 300:
        raise ValueError(f"a whole number of {len(text)} digits")
    return int(text)


def _sound(record: Record) -> bool:
    """Whether it can be drawn: the file may be another's, found among the inputs, and hold anything."""
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
    """What a run that was stopped and resumed has in common with one that was not: all that was measured, but time.

    Records of training and evaluation are that. The others belong to a session.
    """
    of_time = ("time", "seconds", "spent")
    return [
        {key: value for key, value in record.items() if key not in of_time and not key.endswith("_per_s")}
        for record in records
        if record.get("kind") in ("train", "eval")
    ]


def rewind(source: str | os.PathLike[str], target: Path, step: int) -> list[Record]:
    """Write to `target` the records of `source` up to `step`, all or nothing, and return them."""
    kept = [r for r in read(source) if isinstance(r.get("step", 0), int) and r.get("step", 0) <= step] if step else []
    temporary = target.with_name(f".writing-{target.name}")
    with open(temporary, "w", encoding="ascii", newline="\n") as file:
        file.writelines(json.dumps(record) + "\n" for record in kept)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, target)
    return kept


def encode(record: Record) -> tuple[Record, bytes]:
    """A record as plain values, nan and infinity among them, and as a line of strict JSON, where those are null.

    Raises TypeError for a value that is neither JSON's, nor a path, nor has `item()`.
    """
    text = json.dumps(record, default=_item)
    strict = json.loads(text, parse_constant=lambda constant: None)
    return json.loads(text), (json.dumps(strict, allow_nan=False) + "\n").encode("ascii")


def _item(value: Any) -> Any:
    """What json cannot write: a path as text, a 0-d tensor or array as its number."""
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    with suppress(AttributeError, ValueError, RuntimeError):  # an array of several values has no item
        return value.item()
    raise TypeError(
        f"a record holds numbers, strings, lists and dicts of them, paths and 0-d tensors, got "
        f"{type(value).__name__}: {value!r:.80}; convert it before it is recorded"
    )


def numbers(record: Record) -> dict[str, float]:
    """The measured numbers of a record: no facts, no flags, no text."""
    return {
        key: value
        for key, value in record.items()
        if key not in FACTS and isinstance(value, int | float) and not isinstance(value, bool)
    }


def texts(record: Record) -> dict[str, str]:
    """What a record says in words, beside its facts."""
    return {key: value for key, value in record.items() if key not in FACTS and isinstance(value, str)}


def owner() -> Record:
    """What a "start" record says of who writes it."""
    return {"host": socket.gethostname(), "pid": os.getpid()}


def running(records: list[Record]) -> bool:
    """Whether the last session among the records still goes on: begun, not ended, on this machine, and alive."""
    last = next((r for r in reversed(records) if r.get("kind") in ("start", "stop")), {})
    if last.get("kind") != "start" or last.get("host") != socket.gethostname():
        return False
    try:
        os.kill(int(last["pid"]), 0)
    except (KeyError, ValueError, OverflowError, ProcessLookupError):
        return False
    except PermissionError:
        pass  # somebody else's, but there
    return True
