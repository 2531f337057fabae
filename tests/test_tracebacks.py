"""A worker's traceback shows the user's own lines, whichever cloudpickle carried the function to it."""

from __future__ import annotations

import pickle
import subprocess
import sys
import textwrap
import traceback
from collections.abc import Callable
from pathlib import Path
from types import CodeType
from typing import Any

import cloudpickle
import pytest

from kaggle_mgpu.launching import pickling

CODE = textwrap.dedent(
    """
    class Net:
        def method(self):
            return nested()()  # line of the method

        @staticmethod
        def static():
            return (lambda: Net().method())()  # line of the lambda

    def nested():
        def inner():
            return [1 // zero for zero in [0]]  # line of the nested function
        return inner

    def cause():
        try:
            Net.static()  # line of the static method's call
        except ZeroDivisionError as error:
            raise ValueError("cause") from error  # line of the error with a cause

    def function():
        try:
            cause()  # line of the outermost call
        except ValueError:
            raise RuntimeError("while handling")  # line of the error during handling
    """
)
LINES = [line.partition("# ")[2] for line in CODE.splitlines() if "# line" in line]


def cloudpickle_that(names_the_file: Callable[[CodeType], str]) -> Callable[[CodeType], Any]:
    """Stand in for the function of cloudpickle that changed: 3.1.3 writes "<dynamic-code>" where 3.0 named the file."""
    own = cloudpickle.cloudpickle._code_reduce

    def reduce(code: CodeType) -> Any:
        make, arguments = own(code)[:2]
        filenames = (code.co_filename, "<dynamic-code>")
        place = next(i for i, value in enumerate(arguments) if isinstance(value, str) and value in filenames)
        return make, (*arguments[:place], names_the_file(code), *arguments[place + 1 :])

    return reduce


@pytest.mark.parametrize(
    "names_the_file",
    [lambda code: code.co_filename, lambda code: "<dynamic-code>"],
    ids=["cloudpickle 3.0", "cloudpickle 3.1.3"],
)
def test_functions_keep_their_file_with_any_cloudpickle(
    names_the_file: Callable[[CodeType], str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(cloudpickle.Pickler._dispatch_table, CodeType, cloudpickle_that(names_the_file))
    path = tmp_path / "cell.py"
    path.write_text(CODE)
    names: dict[str, Any] = {"__name__": "__main__"}
    exec(compile(CODE, str(path), "exec"), names)
    function = pickle.loads(pickling.dumps(names["function"], "the function"))
    with pytest.raises(RuntimeError) as caught:
        function()
    shown = "".join(traceback.format_exception(caught.value))
    assert [line for line in LINES if line not in shown] == []


def test_a_script_sees_its_own_lines_through_causes_and_handling(tmp_path: Path) -> None:
    path = tmp_path / "script.py"
    main = "if __name__ == '__main__':\n    from kaggle_mgpu import launch\n    launch(function, nproc=2)\n"
    path.write_text(CODE + main)
    done = subprocess.run([sys.executable, str(path)], capture_output=True, text=True, timeout=600)
    assert done.returncode == 1
    worker = done.stderr.partition("WorkerTraceback")[2]
    assert [line for line in LINES if line not in worker] == []
    assert f'File "{path}"' in worker
