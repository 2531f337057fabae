"""Versions and floors read from files, and protobuf="pin" with a real pip in a real environment, off the network."""

from __future__ import annotations

import base64
import hashlib
import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from kaggle_mgpu.env import protobuf_fix
from test_env import ROOT, bare, generated, package


def protobuf_at(folder: Path, version: str) -> Path:
    package(folder, google__protobuf__x="")
    (folder / "google/protobuf/__init__.py").write_text(f"# comment\n__version__ = '{version}'\n")
    return folder


@pytest.mark.parametrize("version", ["3.20.3", "5.29.5", "6.33.6"])
def test_the_version_is_the_first_on_the_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, version: str) -> None:
    first, second = protobuf_at(tmp_path / "a", version), protobuf_at(tmp_path / "b", "7.0.0")
    monkeypatch.setattr(sys, "path", [str(tmp_path / "none"), str(first), str(second)])
    assert protobuf_fix.installed() == tuple(map(int, version.split(".")))
    monkeypatch.setattr(sys, "path", [])
    assert protobuf_fix.installed() is None


def test_floors_are_read_from_generated_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "path", [str(tmp_path)])
    assert protobuf_fix.floors((3, 20, 3)) == {}
    package(
        tmp_path,
        tensorflow__core__framework__types_pb2=generated("5.28.3"),
        # 4.25 wrote its version too, but checks nothing, and loads with 3.20.3
        google__rpc__status_pb2="# Protobuf Python Version: 4.25.3\nfrom google.protobuf import descriptor\n",
    )
    assert protobuf_fix.floors((3, 20, 3)) == {"tensorflow": (5, 28, 3)}


def test_wandb_brings_several_generations(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "path", [str(tmp_path)])
    package(
        tmp_path,
        wandb__proto__v5__wandb_base_pb2="# Protobuf Python Version: 5.26.0\n",
        wandb__proto__v6__wandb_base_pb2=generated("6.30.0"),
    )
    floors = {major: protobuf_fix.floors((major, 0, 0)).get("wandb") for major in (3, 4, 5, 6, 7)}
    assert floors == {3: (5, 26, 0), 4: (5, 26, 0), 5: (5, 26, 0), 6: (6, 30, 0), 7: None}


# --- pin --------------------------------------------------------------------------------------------

STRUCT = """
class Struct(dict):
    def SerializeToString(self):
        return repr(dict(self)).encode()
    @classmethod
    def FromString(cls, text):
        return cls(eval(text))
"""
FUSSY = "import google.protobuf\nassert google.protobuf.__version__ > '4'\n"  # like a package that checks by itself


def wheel(folder: Path, version: str, struct: str = STRUCT) -> None:
    """A protobuf as small as can be, and as far as pip can tell a real one."""
    info = f"protobuf-{version}.dist-info"
    files = {
        "google/protobuf/__init__.py": f"__version__ = '{version}'\n",
        "google/protobuf/struct_pb2.py": struct,
        f"google/protobuf/only_in_{version.replace('.', '_')}.py": "",
        f"{info}/METADATA": f"Metadata-Version: 2.1\nName: protobuf\nVersion: {version}\n",
        f"{info}/WHEEL": "Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
    }
    record = ""
    for name, text in files.items():
        digest = base64.urlsafe_b64encode(hashlib.sha256(text.encode()).digest()).rstrip(b"=").decode()
        record += f"{name},sha256={digest},{len(text)}\n"
    files[f"{info}/RECORD"] = f"{record}{info}/RECORD,,\n"
    folder.mkdir(exist_ok=True)
    with zipfile.ZipFile(folder / f"protobuf-{version}-py3-none-any.whl", "w") as archive:
        for name, text in files.items():
            archive.writestr(name, text)


class Place:
    """A virtual environment with a fake protobuf 6.33.6, and wheels for pip to find; no network."""

    def __init__(self, folder: Path) -> None:
        self.python, self.wheels = folder / "venv/bin/python", folder / "wheels"
        subprocess.run([sys.executable, "-m", "venv", str(folder / "venv")], check=True)
        (self.site,) = (folder / "venv/lib").glob("python*/site-packages")
        wheel(self.wheels, "6.33.6")

    def run(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        pip = {"PIP_NO_INDEX": "1", "PIP_FIND_LINKS": str(self.wheels), "PIP_CONFIG_FILE": os.devnull}
        command = [str(self.python), *arguments]
        return subprocess.run(command, env=bare(str(ROOT), **pip), capture_output=True, text=True, timeout=600)

    def reset(self) -> None:
        wheel(self.wheels, "3.20.3")
        done = self.run("-m", "pip", "install", "--quiet", "--force-reinstall", "protobuf==6.33.6")
        assert done.returncode == 0, done.stderr
        for path in self.site.glob("some_*.py"):
            path.unlink()

    def pin(self) -> tuple[int, str]:
        done = self.run("-m", "kaggle_mgpu.env", "--protobuf", "pin")
        assert done.stderr == ""
        return done.returncode, next(line for line in done.stdout.splitlines()[1:] if " protobuf==3.20.3 " in line)

    def files(self) -> set[str]:
        return {str(path.relative_to(self.site)) for path in self.site.rglob("*") if "protobuf" in str(path)}


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Place:
    return Place(tmp_path_factory.mktemp("pin"))


@pytest.fixture
def place(made: Place) -> Place:
    made.reset()
    return made


def test_pin_installs_and_verifies(place: Place) -> None:
    (place.site / "some_pb2.py").write_text("import google.protobuf\n")
    rc, line = place.pin()
    assert (rc, line.split()[0]) == (0, "installed"), line
    assert "instead of 6.33.6, verified in a fresh interpreter" in line
    assert "google/protobuf/only_in_3_20_3.py" in place.files()
    assert "google/protobuf/only_in_6_33_6.py" not in place.files()
    assert place.pin()[1].split()[0] == "kept"


def test_pin_is_refused_with_the_list_of_what_it_would_break(place: Place) -> None:
    before = place.files()
    (place.site / "some_pb2.py").write_text(generated("5.28.3"))
    (place.site / "some_other_pb2.py").write_text(generated("6.31.1"))
    rc, line = place.pin()
    assert (rc, line.split()[0]) == (1, "refused")
    assert "it would break some_other_pb2 (needs 6.31.1), some_pb2 (needs 5.28.3); protobuf='auto' works" in line
    assert place.files() == before


def test_pin_is_refused_once_protobuf_is_imported(place: Place) -> None:
    before = place.files()
    done = place.run("-c", "import google.protobuf; from kaggle_mgpu import env; env.fix('pin')")
    assert "refused   protobuf==3.20.3  protobuf is already imported in this process: restart" in done.stdout
    assert place.files() == before


@pytest.mark.parametrize(
    ("code", "struct", "why"),
    [
        (FUSSY, STRUCT, "a fresh interpreter could no longer import some_pb2; nothing was changed"),
        ("", "raise ImportError", "a fresh interpreter could not use it; nothing was changed"),
    ],
)
def test_pin_changes_nothing_if_a_package_would_be_lost(place: Place, code: str, struct: str, why: str) -> None:
    before = place.files()
    (place.site / "some_pb2.py").write_text(code)
    (place.site / "some_broken_pb2.py").write_text("raise ImportError")  # it was no better before
    wheel(place.wheels, "3.20.3", struct)
    rc, line = place.pin()
    assert (rc, line.split()[0]) == (1, "refused")
    assert why in line
    assert place.files() == before
    assert place.run("-m", "pip", "show", "protobuf").stdout.splitlines()[1] == "Version: 6.33.6"
    assert place.run("-c", "import google.protobuf.struct_pb2, some_pb2").returncode == 0


def test_pin_says_what_pip_said(place: Place) -> None:
    before = place.files()
    (place.wheels / "protobuf-3.20.3-py3-none-any.whl").unlink()
    rc, line = place.pin()
    assert (rc, line.split()[0]) == (1, "refused")
    assert "pip could not install it: ERROR: No matching distribution found for protobuf==3.20.3" in line
    assert "; nothing was changed; protobuf='auto'" in line
    assert place.files() == before


@pytest.mark.parametrize("removed", [False, True])
def test_pin_says_what_is_left_if_the_second_installation_fails(place: Place, removed: bool) -> None:
    breaks = place.site / "sitecustomize.py"
    breaks.write_text(
        "import os, shutil, sys\n"
        "if 'install' in sys.orig_argv and '--target' not in sys.orig_argv:\n"
        f"    if {removed}: shutil.rmtree({str(place.site / 'google')!r})\n"
        "    os.write(2, b'ERROR: the disk is full\\n')\n"
        "    os._exit(1)\n"
    )
    try:
        rc, line = place.pin()
    finally:
        breaks.unlink()
    assert (rc, line.split()[0]) == (1, "refused")
    left = "none" if removed else "6.33.6"
    assert f"pip could not install it: ERROR: the disk is full; protobuf now: {left}; protobuf='auto'" in line
