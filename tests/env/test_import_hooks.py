"""What happens as protobuf, TensorFlow and TensorBoard load: each in a fresh process, and once in a real kernel."""

from __future__ import annotations

import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from kaggle_mgpu.env import import_hooks
from test_env import ROOT, TEMPORARY, bare, package, protobuf, python

spec = importlib.util.spec_from_file_location("tools_env_matrix", ROOT / "tools" / "env_matrix.py")
assert spec is not None
assert spec.loader is not None
matrix: Any = importlib.util.module_from_spec(spec)
sys.modules[spec.name] = matrix  # its dataclasses look themselves up there
spec.loader.exec_module(matrix)

KNOWN = """\
2026-11-20 08:23:47.284168: E external/local_xla/xla/cuda_fft.cc:477] Unable to register cuFFT factory: \
Attempting to register factory for plugin cuFFT when one has already been registered
WARNING: All log messages before absl::InitializeLog() is called are written to STDERR
E0000 00:00:1795163027.309311   20017 cuda_dnn.cc:8310] Unable to register cuDNN factory: \
Attempting to register factory for plugin cuDNN when one has already been registered
E0000 00:00:1795163027.313353   20017 cuda_blas.cc:1418] Unable to register cuBLAS factory: \
Attempting to register factory for plugin cuBLAS when one has already been registered
W0000 00:00:1795163034.272279   20094 computation_placer.cc:177] computation placer already registered. \
Please check linkage and avoid linking the same target more than once.
"""
INFORMATION = "I0000 00:00:1795163461.717262   23399 port.cc:153] oneDNN custom operations are on. You may see\n"
UNKNOWN = "E0000 00:00:1795163034.272279   20094 gpu.cc:1] Unable to register cuDNN: out of memory\n\ttwo lines\n"

# What TensorFlow does at import: lines from C++, a method that only some protobufs have, and PyErr_Print for errors.
TENSORFLOW = f"""
import os, sys
os.write(2, {KNOWN.encode()!r})
os.write(2, {UNKNOWN.encode()!r})
try:
    from google.protobuf import message_factory
    message_factory.MessageFactory().GetPrototype("descriptor")
except Exception:
    sys.excepthook(*sys.exc_info())
print("from Python", file=sys.stderr)
{{}}
"""


def tensorflow(folder: Path, end: str = "") -> Path:
    """A fake TensorFlow on a fake protobuf without the method; `end` is its last line."""
    protobuf(folder, method=False)
    (folder / "tensorflow").mkdir()
    (folder / "tensorflow/__init__.py").write_text(TENSORFLOW.format(end))
    return folder


def stderr(code: str, *paths: Path, **given: str) -> tuple[int, str]:
    """Exit code and standard error of a fresh process."""
    search = os.pathsep.join(map(str, [*paths, ROOT]))
    command = [sys.executable, "-S", "-c", code]
    done = subprocess.run(command, env=bare(search, **given), capture_output=True, text=True, timeout=600)
    return done.returncode, done.stderr


FIX = "from kaggle_mgpu import env; env.fix(verbose=False); "


def test_only_the_known_lines_are_dropped(tmp_path: Path) -> None:
    fake = tensorflow(tmp_path)
    rc, plain = stderr("import tensorflow", fake)
    assert (rc, plain.count("GetPrototype'")) == (0, 1)  # the fake is broken in the way the real one is
    assert KNOWN in plain
    assert stderr(FIX + "import tensorflow", fake) == (0, UNKNOWN + "from Python\n")
    # what was begun before stays before, whole
    partly = "import sys; sys.stderr.write('partly '); import tensorflow"
    assert stderr(FIX + partly, fake) == (0, "partly " + UNKNOWN + "from Python\n")
    # as it was afterwards: the filter is for the import alone
    rc, after = stderr(
        FIX + "import tensorflow, os; os.write(2, b'Unable to register cuDNN factory: Attempting')", fake
    )
    assert after == UNKNOWN + "from Python\nUnable to register cuDNN factory: Attempting"


def test_quiet_false_shows_all(tmp_path: Path) -> None:
    rc, shown = stderr("from kaggle_mgpu import env; env.fix(quiet=False); import tensorflow", tensorflow(tmp_path))
    assert (rc, shown) == (0, KNOWN + UNKNOWN + "from Python\n")
    code = FIX + "env.fix(quiet=False); import os; print(os.environ.get('TF_CPP_MIN_LOG_LEVEL')); import tensorflow"
    assert KNOWN in stderr(code, tmp_path)[1]
    assert python(code, tmp_path).strip().endswith("None")  # what an earlier call had set is taken back
    assert KNOWN not in stderr(FIX + "env.fix(quiet=False); env.fix(quiet=True); import tensorflow", tmp_path)[1]


def test_information_is_dropped_unless_asked_for(tmp_path: Path) -> None:
    package(tmp_path, tensorflow__x="")
    (tmp_path / "tensorflow/__init__.py").write_text(f"import os; os.write(2, {INFORMATION.encode()!r})")
    assert stderr(FIX + "import tensorflow", tmp_path) == (0, "")
    assert stderr(FIX + "import tensorflow", tmp_path, TF_CPP_MIN_LOG_LEVEL="0") == (0, INFORMATION)


def test_a_failing_import_still_fails_and_its_lines_are_shown(tmp_path: Path) -> None:
    rc, shown = stderr(FIX + "import tensorflow", tensorflow(tmp_path, "import a_package_that_is_not_there"))
    assert rc == 1
    assert shown.startswith(UNKNOWN + "from Python\n")
    assert shown.endswith("ModuleNotFoundError: No module named 'a_package_that_is_not_there'\n")
    assert not list(Path(TEMPORARY.name).glob(f"{import_hooks.SAVED_PREFIX}*"))


def test_the_lines_of_a_process_that_dies_are_kept_and_found(tmp_path: Path) -> None:
    (tmp_path / "tmp").mkdir()
    fake, given = tensorflow(tmp_path, "os.kill(os.getpid(), 9)"), {"TMPDIR": str(tmp_path / "tmp")}
    assert stderr(FIX + "import tensorflow", fake, **given) == (-9, "")
    (kept,) = (tmp_path / "tmp").iterdir()
    assert kept.read_text().startswith(KNOWN + UNKNOWN)
    assert kept.stat().st_mode & 0o077 == 0
    out = python("from kaggle_mgpu import env; env.fix()", given=given)
    assert f"  left      {kept}  process " in out
    kept.rename(kept.with_name(re.sub(r"\d+", str(os.getpid()), kept.name, count=1)))  # one that is still at it
    assert "left" not in python("from kaggle_mgpu import env; env.fix()", given=given)


@pytest.mark.parametrize("broken", ["os.close(2)", "os.environ['TMPDIR'] = '/nonexistent'"])
def test_where_nothing_can_be_redirected_the_import_works_as_ever(tmp_path: Path, broken: str) -> None:
    code = f"{FIX}import os; {broken}; import tensorflow; print('imported', flush=True); os._exit(0)"
    package(tmp_path, tensorflow__x="")
    assert python(code, tmp_path) == "imported\n"


def test_a_missing_tensorflow_is_missing() -> None:
    rc, shown = stderr(FIX + "import tensorflow")
    assert rc == 1
    assert shown.endswith("ModuleNotFoundError: No module named 'tensorflow'\n")


def test_asking_for_its_spec_does_not_import_and_does_no_harm(tmp_path: Path) -> None:
    code = f"""
import importlib.util, sys
{FIX}
for _ in range(3):
    assert importlib.util.find_spec("tensorflow").origin.endswith("__init__.py")
assert "tensorflow" not in sys.modules
import tensorflow, inspect
assert type(tensorflow.__loader__).__name__ == "SourceFileLoader"
assert tensorflow.__spec__.loader is tensorflow.__loader__
assert inspect.getsource(tensorflow)
"""
    assert stderr(code, tensorflow(tmp_path)) == (0, UNKNOWN + "from Python\n")


def test_too_late_is_said_and_nothing_is_purged(tmp_path: Path) -> None:
    code = f"import tensorflow, sys; before = set(sys.modules); {FIX}print(env.fix(verbose=False, quiet=True)); "
    code += "assert before <= set(sys.modules)"
    fake = tensorflow(tmp_path)
    first = " ".join(python(code.replace(FIX, "from kaggle_mgpu import env; "), fake).split())
    assert "too late tensorflow's lines at import tensorflow is already imported, and has written its" in first
    assert "too late protobuf GetPrototype added too late to prevent tensorflow's messages" in first
    assert "too late" not in python(code, fake)  # said once


# --- TensorBoard ------------------------------------------------------------------------------------


def tensorboard(folder: Path) -> Path:
    """The part of TensorBoard that decides whether to import TensorFlow, as its own code does."""
    code = "try:\n    from tensorboard.compat import notf\n    tf = 'stub'\n"
    code += "except ImportError:\n    import tensorflow as tf\n"
    package(folder, tensorboard__compat__decide=code, tensorflow__x="")
    (folder / "tensorflow/__init__.py").write_text("print('TensorFlow was imported')")
    return folder


@pytest.mark.parametrize(
    ("given", "first", "imported"), [({}, "", False), ({"USE_TF": "1"}, "", True), ({}, "import tensorflow; ", True)]
)
def test_tensorboard_does_without_tensorflow_unless_it_is_wanted(
    tmp_path: Path, given: dict[str, str], first: str, imported: bool
) -> None:
    fake = tensorboard(tmp_path)
    code = FIX + first + "from tensorboard.compat.decide import tf; print(tf if tf == 'stub' else tf.__name__)"
    expected = "TensorFlow was imported\ntensorflow\n" if imported else "stub\n"
    assert python(code, fake, given=given) == expected
    assert python(code.replace("env.fix(verbose=False); ", ""), fake).endswith("tensorflow\n")  # the fake can fail


def test_the_real_tensorboard_too(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    (tmp_path / "tensorflow.py").write_text("raise SystemExit('TensorFlow was imported')")
    code = "from torch.utils.tensorboard import SummaryWriter as W; w = W('runs'); w.add_scalar('a', 1.0); w.close()"
    code = f"import os; os.chdir({str(tmp_path)!r}); {{}}{code}"
    assert python(code.format(FIX), tmp_path, site=True) == ""
    with pytest.raises(AssertionError, match="TensorFlow was imported"):
        python(code.format(""), tmp_path, site=True)


# --- a kernel ---------------------------------------------------------------------------------------


def test_a_first_cell_under_papermill(tmp_path: Path) -> None:
    """The fake TensorFlow in a real kernel: fatal without the fix, silent but for the unknown line with it."""
    fake, here = tensorflow(tmp_path), Path(sys.prefix)
    # protobuf 3.20.3 puts `google` there by a .pth file, before PYTHONPATH is asked
    (fake / "sitecustomize.py").write_text("import sys; sys.modules.pop('google', None)")
    search = {"PYTHONPATH": f"{fake}{os.pathsep}{ROOT}", "IPYTHONDIR": str(tmp_path / "ipython")}
    plain = matrix.run_notebook(here, "import tensorflow", "print('second cell')", folder=tmp_path / "a", **search)
    assert plain.rc != 0
    assert plain.error.startswith("AttributeError: ")
    assert "no attribute 'GetPrototype'" in plain.error
    first = "from kaggle_mgpu import env\nenv.fix()"
    fixed = matrix.run_notebook(
        here, first, "import tensorflow", "print('second cell')", folder=tmp_path / "b", **search
    )
    assert (fixed.rc, fixed.error) == (0, "")
    assert "second cell" in fixed.text
    assert "GetPrototype" not in fixed.text
    assert not matrix.REGISTRATION.search(fixed.text)
    assert "gpu.cc:1] Unable to register cuDNN: out of memory" in fixed.text
    assert fixed.text.count("environment ready") == 1  # one line, and no report below it
    assert "Report(" not in fixed.text


# --- a real TensorFlow ------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def real() -> Path:
    """TensorFlow 2.18.1 (the smaller CPU build) with protobuf 6.33.6: made once, kept under build/envs."""
    packages = ("--no-compile", "tensorflow-cpu==2.18.1", "setuptools<80", *matrix.STACKS["newest"])
    try:
        found: Path = matrix.cached("suite", None, packages, ("--no-deps", "protobuf==6.33.6"), timeout=300)
    except (RuntimeError, subprocess.TimeoutExpired) as error:
        pytest.skip(f"no environment with a real TensorFlow, and none can be made: {str(error)[-300:]}")
    return found


def test_a_real_tensorflow_under_papermill(real: Path, tmp_path: Path) -> None:
    plain = matrix.run_notebook(real, matrix.PLAIN, folder=tmp_path / "a")
    assert plain.rc != 0
    assert matrix.GET_PROTOTYPE in plain.error
    fixed = matrix.run_notebook(real, matrix.FIX, matrix.PLAIN, matrix.WORK, folder=tmp_path / "b")
    assert (fixed.rc, fixed.error) == (0, "")
    assert matrix.GET_PROTOTYPE not in fixed.text
    assert not matrix.REGISTRATION.search(fixed.text)
    assert "computed with 2.18.1" in fixed.text
