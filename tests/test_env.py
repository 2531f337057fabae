"""env.fix(): what it sets, what it leaves alone, and protobuf's missing method, each in a fresh process."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from kaggle_mgpu import env

ROOT = Path(__file__).resolve().parents[1]
NO_GPU = "from kaggle_mgpu import env; env.NVIDIA_PATHS = (); "
WITH_GPU = f"from kaggle_mgpu import env; env.NVIDIA_PATHS = ({os.devnull!r},); "
ITEMS = "import json; print(json.dumps({i.name: (i.value, i.action) for i in env.fix(verbose=False).items}))"


def python(code: str, *paths: Path, site: bool = False, given: dict[str, str] | None = None) -> str:
    """Standard output of a process with nothing in its environment but what is given."""
    search = os.pathsep.join(map(str, [*paths, ROOT]))
    command = [sys.executable, *([] if site else ["-S"]), "-c", code]
    variables = {"PATH": os.defpath, "PYTHONPATH": search, "PYTHONDONTWRITEBYTECODE": "1", **(given or {})}
    result = subprocess.run(command, env=variables, capture_output=True, text=True, timeout=60)
    assert result.returncode == 0, result.stderr
    return result.stdout


def package(folder: Path, **files: str) -> Path:
    """A folder for PYTHONPATH with these files; "__" in a name stands for "/"."""
    for name, text in files.items():
        path = folder / (name.replace("__", "/") + ".py")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
        for parent in path.relative_to(folder).parents[:-1]:
            (folder / parent / "__init__.py").touch()
    return folder


def protobuf(folder: Path, method: bool) -> Path:
    """A protobuf with the classes of 6.30 and later, or of 4.22 up to 6.29 that still have the method."""
    old = "def GetPrototype(self, descriptor): return 'its own'" if method else "pass"
    head = "from google.protobuf import message_factory\n"
    return package(
        folder,
        google__protobuf__message_factory=f"def GetMessageClass(d): return 'class of ' + d\n"
        f"class MessageFactory:\n    {old}\n",
        google__protobuf__symbol_database=f"{head}class SymbolDatabase:\n    {old}\n",
    )


USE_PROTOBUF = """
from google.protobuf import symbol_database, message_factory
print(message_factory.MessageFactory().GetPrototype('A'), symbol_database.SymbolDatabase().GetPrototype('B'))
"""


def test_import_and_fix_import_nothing_heavy() -> None:
    heavy = "{'torch', 'numpy', 'tensorflow', 'transformers', 'google.protobuf', 'IPython'}"
    code = f"import sys, kaggle_mgpu.env as e; e.fix(verbose=False); print({heavy} & set(sys.modules))"
    assert python(code, site=True) == "set()\n"


def test_sets_without_gpu() -> None:
    assert json.loads(python(NO_GPU + ITEMS)) == {
        "TF_CPP_MIN_LOG_LEVEL": ["3", "set"],
        "USE_TF": ["0", "set"],
        "USE_FLAX": ["0", "set"],
        "TOKENIZERS_PARALLELISM": ["false", "set"],
        "protobuf GetPrototype": ["", "patched"],
    }


def test_gpu_errors_stay_visible_and_memory_segments_expand() -> None:
    items = json.loads(python(WITH_GPU + ITEMS))
    assert items["TF_CPP_MIN_LOG_LEVEL"] == ["2", "set"]
    assert items["PYTORCH_ALLOC_CONF"] == ["expandable_segments:True", "set"]


@pytest.mark.parametrize(
    ("version", "name"),
    [
        ("2.9.1+cu128", "PYTORCH_CUDA_ALLOC_CONF"),
        ("2.10.0+cu128", "PYTORCH_ALLOC_CONF"),
        ("2.15.0", "PYTORCH_ALLOC_CONF"),
    ],
)
def test_allocator_variable_is_the_one_this_torch_reads(tmp_path: Path, version: str, name: str) -> None:
    torch = package(tmp_path, torch__version=f"__version__ = '{version}'\n")
    (tmp_path / "torch/__init__.py").write_text("raise SystemExit('imported')")
    allocator = [key for key in json.loads(python(WITH_GPU + ITEMS, torch)) if "ALLOC" in key]
    assert allocator == [name]


def test_what_the_user_set_is_kept() -> None:
    mine = {
        "TF_CPP_MIN_LOG_LEVEL": "0",
        "USE_TF": "1",
        "USE_FLAX": "",
        "TOKENIZERS_PARALLELISM": "true",
        "PYTORCH_CUDA_ALLOC_CONF": "max_split_size_mb:64",
        "PROTOCOL_BUFFERS_PYTHON_IMPLEMENTATION": "python",
    }
    dump = ITEMS + f"; import os; print(json.dumps({{k: os.environ[k] for k in {list(mine)}}}))"
    items, environ = map(json.loads, python(WITH_GPU + dump, given=mine).splitlines())
    assert environ == mine
    assert "PYTORCH_ALLOC_CONF" not in items
    assert {action for name, (_, action) in items.items() if name in mine} == {"kept"}


def test_empty_protobuf_implementation_is_removed() -> None:
    name = "PROTOCOL_BUFFERS_PYTHON_IMPLEMENTATION"
    code = NO_GPU + ITEMS + f"; import os; print({name!r} in os.environ)"
    items, left = python(code, given={name: ""}).splitlines()
    assert json.loads(items)[name] == ["", "removed"]
    assert left == "False"


def test_output_is_a_summary_and_what_changed() -> None:
    out = python(
        NO_GPU + "env.fix(); print('--'); env.fix(); print('--'); print(env.fix(verbose=False))",
        given={"SECRET": "s3cr3t"},
    )
    first, again, full = out.split("--\n")
    assert first.splitlines()[0] == "environment ready: 4 set, 1 patched"
    assert "  set       TF_CPP_MIN_LOG_LEVEL=3 " in first
    assert again == "environment ready: nothing to change\n"
    assert "  kept      TF_CPP_MIN_LOG_LEVEL=3 " in full
    assert "s3cr3t" not in out
    assert python(NO_GPU + "env.fix(verbose=False)") == ""


def test_run_as_a_module() -> None:
    out = python("import runpy; runpy.run_module('kaggle_mgpu.env', run_name='__main__')")
    assert out.startswith("environment ready: ")


def test_too_late_says_so_and_still_helps_new_processes(tmp_path: Path) -> None:
    late = package(tmp_path, torch__a="", tensorflow__a="", transformers__a="")
    code = "import torch, tensorflow, transformers; " + WITH_GPU + ITEMS + "; import os; print(os.environ['USE_TF'])"
    items, value = python(code, late).splitlines()
    names = {name for name, (_, action) in json.loads(items).items() if action == "too late"}
    assert names == {"TF_CPP_MIN_LOG_LEVEL", "USE_TF", "USE_FLAX", "PYTORCH_ALLOC_CONF"}
    assert value == "0"
    why = python("import tensorflow; " + NO_GPU + "print(env.fix(verbose=False))", late)
    assert "tensorflow is already imported: holds in new processes only" in why


def test_missing_method_is_added_as_protobuf_loads(tmp_path: Path) -> None:
    new = protobuf(tmp_path, method=False)
    with pytest.raises(AssertionError, match="has no attribute 'GetPrototype'"):
        python(USE_PROTOBUF, new)  # the fake is broken in the way the real one is
    code = f"from kaggle_mgpu import env; env.fix(verbose=False); env.fix(verbose=False)\n{USE_PROTOBUF}"
    assert python(code, new) == "class of A class of B\n"


def test_asking_for_the_spec_before_importing_does_no_harm(tmp_path: Path) -> None:
    code = f"""
import importlib, importlib.util, inspect, sys
from kaggle_mgpu import env
env.fix(verbose=False)
for _ in range(3):
    assert importlib.util.find_spec("google.protobuf.symbol_database") is not None
    assert importlib.util.find_spec("google.protobuf.message_factory") is not None
{USE_PROTOBUF}
assert type(message_factory.__loader__).__name__ == "SourceFileLoader"  # nothing of ours stays behind
assert message_factory.__spec__.loader is message_factory.__loader__
assert "GetMessageClass" in inspect.getsource(message_factory)
importlib.reload(message_factory)
print(message_factory.MessageFactory().GetPrototype("C"))
for name in [name for name in sys.modules if name.startswith(("google", "kaggle_mgpu"))]:
    del sys.modules[name]
from kaggle_mgpu import env
env.fix(verbose=False)
print(sum("Protobuf" in type(finder).__name__ for finder in sys.meta_path))
{USE_PROTOBUF}
"""
    assert python(code, protobuf(tmp_path, method=False)).split("\n")[:-1] == [
        "class of A class of B",
        "class of C",
        "1",
        "class of A class of B",
    ]


def test_protobuf_loaded_before_fix_is_patched_in_place(tmp_path: Path) -> None:
    code = (
        "from google.protobuf import message_factory as m; "
        + NO_GPU
        + ITEMS
        + "; print(m.MessageFactory().GetPrototype('A'))"
    )
    items, got = python(code, protobuf(tmp_path, method=False)).splitlines()
    assert json.loads(items)["protobuf GetPrototype"] == ["", "patched"]
    assert got == "class of A"


def test_protobuf_with_the_method_is_left_alone(tmp_path: Path) -> None:
    code = f"{NO_GPU}env.fix(verbose=False)\n{USE_PROTOBUF}print(env.fix(verbose=False))"
    out = python(code, protobuf(tmp_path, method=True))
    assert out.startswith("its own its own\n")
    assert "kept      protobuf GetPrototype" in out


def test_installed_protobuf_still_works() -> None:
    pytest.importorskip("google.protobuf")
    code = """
from kaggle_mgpu import env
env.fix(verbose=False)
from google.protobuf import message_factory, struct_pb2
message = struct_pb2.Struct()
message["a"] = 1
print(message_factory.MessageFactory().GetPrototype(struct_pb2.Struct.DESCRIPTOR).__name__, message["a"])
"""
    assert python(code, site=True) == "Struct 1.0\n"


def test_cpu_count_obeys_the_container(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(env, "CGROUP", tmp_path)
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(8)), raising=False)
    assert env.cpu_count() == 8
    (tmp_path / "cpu.max").write_text("max 100000\n")
    assert env.cpu_count() == 8
    (tmp_path / "cpu.max").write_text("350000 100000\n")
    assert env.cpu_count() == 4
    (tmp_path / "cpu.max").unlink()
    (tmp_path / "cpu").mkdir()
    (tmp_path / "cpu/cpu.cfs_quota_us").write_text("-1\n")
    (tmp_path / "cpu/cpu.cfs_period_us").write_text("100000\n")
    assert env.cpu_count() == 8
    (tmp_path / "cpu/cpu.cfs_quota_us").write_text("200000\n")
    assert env.cpu_count() == 2


def test_threads_per_worker(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(env, "cpu_count", lambda: 4)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    assert [env.threads_per_worker(nproc) for nproc in (1, 2, 3, 8)] == [4, 2, 1, 1]
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    assert env.threads_per_worker(2) == 3
    monkeypatch.setenv("OMP_NUM_THREADS", "many")
    assert env.threads_per_worker(2) == 2
    with pytest.raises(ValueError, match="nproc is 0, expected at least 1"):
        env.threads_per_worker(0)
