"""What a notebook's parameters cells define."""

from __future__ import annotations

import symtable
from collections.abc import Mapping
from typing import Any


def notebook_parameters(namespace: Mapping[str, Any]) -> dict[str, Any]:
    """What a notebook's parameters cell defines, and the cell that papermill puts after it, by IPython's history `In`.

    Both begin with "# Parameters", the notebook's own with "# Parameters of this notebook". Only what they assign
    counts, so the cell can be edited and run again when the notebook is full of other names. What they import, define
    with def or class, or use inside a comprehension is no parameter. Give the result to
    `Config.from_dict`: a misspelt name is an error there, while papermill only warns of it in its log.

    Raises:
        RuntimeError: no such cell was run.
    """
    names: list[str] | None = None
    for cell in namespace["In"][:-1]:
        if cell.startswith("# Parameters of this notebook"):
            names = []  # edited and run again: the newest counts
        if names is not None and cell.startswith("# Parameters"):
            symbols = symtable.symtable(cell, "<parameters>", "exec").get_symbols()
            names += [symbol.get_name() for symbol in symbols if symbol.is_assigned() and not symbol.is_namespace()]
    if names is None:
        raise RuntimeError("no cell that begins with '# Parameters of this notebook' was run: run it, then this one")
    return {name: namespace[name] for name in names if name in namespace}
