"""Imports run downward only: between folders by one order, within a folder without a cycle.

All imports are read, also those inside functions and those for type checkers alone.
"""

import ast
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parent.parent / "spectral_ds"
# From low to high: a folder, or a module of the root.
LAYERS = (
    "files",
    "text",
    "console",
    "sharding",
    "engines",
    "graph",
    "checkpoint",
    "geometry",
    "sketches",
    "laplacian",
    "spectrum",
    "filters",
    "coactivation",
    "config",
    "stack",
    "monitor",
    "study",
    "plugin",
    "attach",
    "planning",
    "cli",
    "run",
    "__init__",
)


def modules_of(package):
    """{dotted name within the package: path}; a folder's own module has the folder's name."""
    found = {}
    for path in sorted(package.rglob("*.py")):
        parts = path.relative_to(package).with_suffix("").parts
        if len(parts) > 1 and parts[-1] == "__init__":
            parts = parts[:-1]
        found[".".join(parts)] = path
    return found


def imports_of(package, name, modules):
    """{module of the package that `name` imports: line}; itself left out."""
    root, path = package.name, modules[name]
    inside = [root, *name.split(".")] if name != "__init__" else [root]
    here = inside if path.name == "__init__.py" else inside[:-1]  # what "." means
    found = {}
    for node in ast.walk(ast.parse(path.read_text())):
        targets = []
        if isinstance(node, ast.Import):
            targets = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = here[: len(here) - node.level + 1] if node.level else []
            base = ".".join([*base, *filter(None, [node.module])])
            # A name may be a submodule.
            targets = [f"{base}.{alias.name}" for alias in node.names]
        for target in targets:
            parts = target.split(".")
            if parts[0] != root:
                continue
            parts = parts[1:]
            while parts and ".".join(parts) not in modules:
                parts.pop()
            imported = ".".join(parts) or "__init__"
            if imported != name:
                found.setdefault(imported, node.lineno)
    return found


def layer_of(name):
    return name.partition(".")[0]


def upward_imports(package, layers):
    """What is imported from a higher layer, as `importer:line imports imported`."""
    modules = modules_of(package)
    unknown = {layer_of(name) for name in modules} - set(layers)
    problems = [f"{layer} has no place among the layers" for layer in sorted(unknown)]
    place = {layer: index for index, layer in enumerate(layers)}
    for name in modules:
        for imported, line in imports_of(package, name, modules).items():
            low, high = (place.get(layer_of(each), -1) for each in (name, imported))
            if low >= 0 and high > low:
                problems.append(f"{name}:{line} imports {imported}")
    return problems


def cycles(package):
    """For each layer that has one, a cycle of imports between its modules."""
    modules = modules_of(package)
    found = []
    for layer in sorted({layer_of(name) for name in modules}):
        inside = [name for name in modules if layer_of(name) == layer]
        # Importing a folder's own module from inside it is part of no cycle that Python minds, but
        # of one that a reader does.
        graph = {n: imports_of(package, n, modules).keys() & set(inside) for n in inside}
        try:
            TopologicalSorter(graph).prepare()
        except CycleError as error:
            found.append(" -> ".join(error.args[1]))
    return found


def test_no_folder_imports_one_above_it():
    assert upward_imports(PACKAGE, LAYERS) == []


def test_no_folder_has_a_cycle():
    assert cycles(PACKAGE) == []


def test_every_layer_is_there():
    assert {layer_of(name) for name in modules_of(PACKAGE)} == set(LAYERS)


@pytest.fixture
def package(tmp_path):
    """Writes a package of the folders `low` and `high`, and reads it."""

    def write(**texts):
        root = tmp_path / "made_up"
        for name in ("low/__init__", "low/a", "low/b", "high/__init__", "high/c", "__init__"):
            path = root / f"{name}.py"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(texts.get(name.replace("/", "_"), ""))
        return root

    return write


ORDER = ("low", "high", "__init__")
UPWARD = {
    "a module": "import made_up.high.c",
    "its name": "from made_up.high.c import something",
    "a module of a folder": "from made_up.high import c",
    "relative": "from ..high.c import something",
    "a relative folder": "from .. import high",
    "inside a function": "def f():\n    from made_up.high.c import something",
    "for type checkers": "if TYPE_CHECKING:\n    from made_up.high.c import Something",
    "the package": "import made_up",
}


@pytest.mark.parametrize("how", UPWARD)
def test_an_import_upward_is_found(package, how):
    root = package(low_a=UPWARD[how], high_c="from made_up.low.a import x\nfrom ..low import b")
    [problem] = upward_imports(root, ORDER)
    assert problem.startswith("low.a:")
    assert problem.split(" imports ")[1] in ("high.c", "high", "__init__")


def test_a_folder_without_a_place_is_found(package):
    assert upward_imports(package(), ORDER[1:]) == ["low has no place among the layers"]


@pytest.mark.parametrize(
    ("texts", "cycle"),
    [
        ({"low_a": "from .b import x", "low_b": "def f():\n    from .a import y"}, {"a", "b"}),
        ({"low___init__": "from .a import x", "low_a": "from made_up.low import x"}, {"a"}),
    ],
)
def test_a_cycle_in_a_folder_is_found(package, texts, cycle):
    [found] = cycles(package(**texts))
    assert {name.partition(".")[2] for name in found.split(" -> ")} - {""} == cycle


def test_imports_downward_and_of_others_are_no_problem(package):
    root = package(
        low_a="import os\nfrom . import b\nfrom numpy import made_up",
        low___init__="from .a import x\nfrom .b import y",
        high_c="from made_up.low.a import x\nfrom made_up import low",
        high___init__="from .c import z",
        __init__="from .high import z\nfrom .low import x",
    )
    assert upward_imports(root, ORDER) == []
    assert cycles(root) == []
