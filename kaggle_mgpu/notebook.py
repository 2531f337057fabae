"""This module reads the values defined in a notebook's parameters cells."""

from __future__ import annotations

import symtable
from collections.abc import Mapping
from typing import Any


def notebook_parameters(namespace: Mapping[str, Any]) -> dict[str, Any]:
    """Return the values defined in a notebook's parameters cell and in papermill's cell after it.

    The notebook's cell begins with "# Parameters of this notebook", papermill's with "# Parameters"; both are in
    IPython's history `In`. Only assigned names count, not imports, functions and classes. Pass the result to
    `Config.from_dict`, which raises an error for a misspelt name.

    Raises:
        RuntimeError: no parameters cell was run.
    """
    names: list[str] | None = None
    for cell in namespace["In"][:-1]:
        if cell.startswith("# Parameters of this notebook"):
            names = []  # the newest run counts
        if names is not None and cell.startswith("# Parameters"):
            symbols = symtable.symtable(cell, "<parameters>", "exec").get_symbols()
            names += [symbol.get_name() for symbol in symbols if symbol.is_assigned() and not symbol.is_namespace()]
    if names is None:
        raise RuntimeError("no cell that begins with '# Parameters of this notebook' was run: run it, then this one")
    return {name: namespace[name] for name in names if name in namespace}
