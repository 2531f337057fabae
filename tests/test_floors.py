"""Which file imports which, read from the code: no circle, public names only, nothing heavy at the bottom."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1] / "kaggle_mgpu"
FILES = sorted(path for path in ROOT.rglob("*.py") if "__pycache__" not in path.parts)
MODULES = {
    ".".join(("kaggle_mgpu", *path.relative_to(ROOT).with_suffix("").parts)).removesuffix(".__init__"): path
    for path in FILES
}
NAMES = {path: name for name, path in MODULES.items()}
PACKAGES = sorted({path.parent.name for path in FILES if path.name == "__init__.py" and path.parent.parent == ROOT})
LIGHT = ("env", "machine", "launching")
"""Packages that a notebook imports before torch is there."""
ids = {"ids": lambda path: str(path.relative_to(ROOT))}


@cache
def tree(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"))


def statements(node: ast.AST) -> Iterator[ast.AST]:
    """Every node, in functions too; what only a type checker reads is left out."""
    if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
        return
    yield node
    for child in ast.iter_child_nodes(node):
        yield from statements(child)


@cache
def imports(path: Path, top_level: bool = False) -> list[tuple[str, str]]:
    """(module, name) for each name that a file imports, from wherever; the name is "" for `import module`."""
    package = NAMES[path].split(".") if path.name == "__init__.py" else NAMES[path].split(".")[:-1]
    found = []
    for node in tree(path).body if top_level else statements(tree(path)):
        if isinstance(node, ast.Import):
            found += [(alias.name, "") for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            module = ".".join([*base, *([node.module] if node.module else [])])
            found += [(module, alias.name) for alias in node.names]
    return found


def arrows(path: Path) -> set[str]:
    """The modules of the package that a file imports."""
    targets = set()
    for module, name in imports(path):
        if module.split(".")[0] == "kaggle_mgpu":
            targets.add(f"{module}.{name}" if f"{module}.{name}" in MODULES else module)
    return targets


def room(module: str) -> str:
    """The package, or the module beside the packages, that a module belongs to; "" for kaggle_mgpu itself."""
    return ".".join(module.split(".")[1:2])


def circle(graph: dict[str, set[str]]) -> list[str]:
    """A way from a node back to itself; [] where there is none."""
    done: set[str] = set()

    def search(node: str, way: list[str]) -> list[str]:
        if node in way:
            return [*way[way.index(node) :], node]
        if node in done:
            return []
        for other in sorted(graph.get(node, ())):
            if found := search(other, [*way, node]):
                return found
        done.add(node)
        return []

    return next((found for node in sorted(graph) if (found := search(node, []))), [])


def public(package: str) -> set[str]:
    """The names in a package's __all__."""
    for node in tree(ROOT / package / "__init__.py").body:
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "__all__":
            return set(ast.literal_eval(node.value))
    return set()


def test_a_circle_is_found() -> None:
    assert circle({"a": {"b"}, "b": {"c", "d"}, "c": set(), "d": {"b"}}) == ["b", "d", "b"]
    assert circle({"a": {"b", "c"}, "b": {"c"}, "c": set()}) == []


def test_no_circle_among_the_packages() -> None:
    graph: dict[str, set[str]] = {}
    for name, path in MODULES.items():
        graph.setdefault(room(name), set()).update({room(target) for target in arrows(path)} - {room(name)})
    assert circle(graph) == []


@pytest.mark.parametrize("package", PACKAGES)
def test_no_circle_among_the_files_of_a_package(package: str) -> None:
    inside = {name: path for name, path in MODULES.items() if room(name) == package}
    assert circle({name: arrows(path) & set(inside) for name, path in inside.items()}) == []


@pytest.mark.parametrize("path", FILES, **ids)
def test_a_package_is_imported_through_its_public_names(path: Path) -> None:
    own = room(NAMES[path])
    bound = set()  # packages as a whole
    for module, name in imports(path):
        parts = module.split(".")
        if parts[0] != "kaggle_mgpu" or room(module) == own != "":
            continue
        if len(parts) == 1 and name in PACKAGES:
            bound.add(name)
        elif len(parts) > 1 and parts[1] in PACKAGES and parts[1] != "recipes":
            assert len(parts) == 2, f"{module} is inside a package: import {name} from kaggle_mgpu.{parts[1]}"
            assert name in public(parts[1]), f"{name} is no public name of {parts[1]}"
    assigned = {n.id for n in ast.walk(tree(path)) if isinstance(n, ast.Name) and not isinstance(n.ctx, ast.Load)}
    for node in ast.walk(tree(path)):
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
            name = node.value.id
            if name in bound and name not in assigned and name != own:
                assert node.attr in public(name), f"{name}.{node.attr} is no public name"


@pytest.mark.parametrize("package", [name for name in PACKAGES if name != "recipes"])
def test_a_package_says_what_it_is_and_hands_on_what_it_has(package: str) -> None:
    assert len((ast.get_docstring(tree(ROOT / package / "__init__.py")) or "").splitlines()) > 2
    code = f"from kaggle_mgpu import {package} as it; print([n for n in it.__all__ if getattr(it, n, None) is None])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=600, check=True)
    assert done.stdout == "[]\n"


@pytest.mark.parametrize("path", [p for p in FILES if room(NAMES[p]) in ("env", "errors")], **ids)
def test_env_needs_nothing_installed(path: Path) -> None:
    outside = {module.split(".")[0] for module, _ in imports(path)} - {"kaggle_mgpu"}
    assert outside <= set(sys.stdlib_module_names)
    assert {room(target) for target in arrows(path)} <= {"env", "errors"}


@pytest.mark.parametrize("path", FILES, **ids)
def test_the_config_is_known_where_runs_are_made_and_nowhere_else(path: Path) -> None:
    if "kaggle_mgpu.config" in arrows(path):
        assert room(NAMES[path]) in ("training", "planning", "recipes", "__main__")


@pytest.mark.parametrize("path", [p for p in FILES if room(NAMES[p]) in LIGHT or p.stem in ("check", "fields")], **ids)
def test_what_comes_before_torch_imports_the_standard_library_alone(path: Path) -> None:
    outside = {module.split(".")[0] for module, _ in imports(path, top_level=True)} - {"kaggle_mgpu"}
    assert outside <= set(sys.stdlib_module_names)


@pytest.mark.quick
def test_importing_the_package_imports_no_torch() -> None:
    code = (
        "import sys, kaggle_mgpu\n"
        "from kaggle_mgpu import check, env, session, devices, launch, TrainConfig, notebook_parameters\n"
        "from kaggle_mgpu import errors, launching, machine, planning\n"
        "env.fix(); devices.gpus(); TrainConfig(lr=1e-3)\n"
        "print([name for name in ('torch', 'numpy', 'tensorflow', 'google.protobuf') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=600, check=True)
    assert done.stdout.splitlines()[-1] == "[]"


@pytest.mark.quick
def test_importing_the_loop_leaves_the_compiler_alone() -> None:
    """torch._dynamo and sympy take longer than the rest of torch, in each process that trains or reads a result."""
    code = "import sys, kaggle_mgpu.training; print({'torch._dynamo', 'sympy'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=600, check=True)
    assert done.stdout.splitlines()[-1] == "set()"


def test_every_name_the_package_hands_on_is_there() -> None:
    import kaggle_mgpu
    from kaggle_mgpu.launching import launch
    from kaggle_mgpu.planning import plan

    assert {name: getattr(kaggle_mgpu, name) for name in kaggle_mgpu.__all__}
    assert {name: getattr(kaggle_mgpu, name) for name in dir(kaggle_mgpu)}
    assert kaggle_mgpu.launch is launch
    assert kaggle_mgpu.plan is plan
    with pytest.raises(AttributeError, match="has no attribute 'lunch'"):
        _ = kaggle_mgpu.lunch
