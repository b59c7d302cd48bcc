"""No import runs upward: from one room of the project to another, and among the modules of each room."""

from __future__ import annotations

import ast
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
# Room -> what its modules may import of the project, besides the room itself.
ALLOWED = {
    "lors": (),
    "baselines": ("lors", "harness.method"),
    "harness": ("lors",),
    "harness/microworld": ("harness.alpaca",),
    "analysis": ("harness.store", "harness.files", "harness.identity", "harness.cards"),
    "hydra_plugins": ("harness",),
}
ROOMS = ("lors", "baselines", "harness", "analysis", "hydra_plugins")


def module_of(file: Path) -> str:
    """Dotted name of a source file."""
    return ".".join(file.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


MODULES = {module_of(file): file for room in ROOMS for file in sorted((ROOT / room).rglob("*.py"))}


def imports(file: Path) -> set[str]:
    """The modules of the project that a file imports, anywhere in it."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {name.name for name in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file}: relative import"
            within = {f"{node.module}.{name.name}" for name in node.names}
            found |= within & MODULES.keys() or {str(node.module)}
    return {name for name in found if name in MODULES}


@pytest.mark.parametrize("room", ALLOWED)
def test_a_room_imports_only_what_is_below_it(room: str) -> None:
    own = room.replace("/", ".")
    for file in sorted((ROOT / room).rglob("*.py")):
        for name in imports(file):
            allowed = any(name == below or name.startswith(f"{below}.") for below in (own, *ALLOWED[room]))
            assert allowed, f"{file.relative_to(ROOT)} imports {name}"


def test_no_modules_import_each_other() -> None:
    graph = {name: imports(file) - {name} for name, file in MODULES.items()}
    for name in [name for name in graph if MODULES[name].name == "__init__.py"]:
        graph[name] = set()  # a face hands names on
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        pytest.fail(" imports ".join(reversed(error.args[1])))
