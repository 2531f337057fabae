"""This module reads the values defined in a notebook's parameters cells."""

from __future__ import annotations

import ast
from collections.abc import Iterator, Mapping
from typing import Any


def notebook_parameters(namespace: Mapping[str, Any]) -> dict[str, Any]:
    """Return the values defined in a notebook's parameters cell and in papermill's cell after it.

    The notebook's cell begins with "# Parameters of this notebook", papermill's with "# Parameters"; both are in
    IPython's history `In`. Only assigned names count, not imports, functions and classes. Pass the result to
    `Config.from_dict`, which raises an error for a misspelt name.

    Args:
        namespace: the notebook's globals().

    Raises:
        RuntimeError: no parameters cell was run.
    """
    names: list[str] | None = None
    for cell in namespace["In"][:-1]:
        if cell.startswith("# Parameters of this notebook"):
            names = []  # the cell was run again: the newest run counts
        if names is not None and cell.startswith("# Parameters"):
            names += _assigned(ast.parse(cell))
    if names is None:
        raise RuntimeError(
            "no cell that begins with '# Parameters of this notebook' was run: run that cell, then this cell"
        )
    return {name: namespace[name] for name in names if name in namespace}


_OWN_NAMES = (
    ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef, ast.Lambda,
    ast.ListComp, ast.SetComp, ast.DictComp, ast.GeneratorExp,
)  # fmt: skip


def _assigned(node: ast.AST) -> Iterator[str]:
    """Yield the names that a cell assigns, in order.

    The module symtable is no substitute: since Python 3.12 it also returns the names inside comprehensions.
    """
    if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
        yield node.id
    for child in ast.iter_child_nodes(node):
        if not isinstance(child, _OWN_NAMES):
            yield from _assigned(child)
