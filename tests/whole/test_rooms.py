"""The house's rules, read from the sources: nine rooms, nothing upwards, no circle, few things in each room."""

from __future__ import annotations

import ast
from graphlib import TopologicalSorter
from pathlib import Path

HOUSE = Path(__file__).parents[2] / "zoray"
FLOORS = ("records", "methods", "models", "engines tasks", "scoring", "pool", "run", "serving")  # lowest first
FLOOR_OF = {room: floor for floor, rooms in enumerate(FLOORS) for room in rooms.split()}
FILES = {
    ".".join(path.relative_to(HOUSE.parent).with_suffix("").parts).removesuffix(".__init__"): path
    for path in HOUSE.rglob("*.py")
}


def imports(module: str) -> set[str]:
    """The modules of the house that one imports anywhere, under TYPE_CHECKING too."""
    nodes = [n for n in ast.walk(ast.parse(FILES[module].read_text("utf-8"))) if isinstance(n, ast.ImportFrom)]
    found = {whole if (whole := f"{n.module}.{a.name}") in FILES else n.module for n in nodes for a in n.names}
    return {one for one in found if one in FILES and one != "zoray"}


def test_nothing_is_imported_from_above_beside_or_in_a_circle():
    for module in FILES:
        own, *others = (name.split(".")[1] if "." in name else "" for name in (module, *imports(module)))
        above = [o for o in others if own in FLOOR_OF and o != own and FLOOR_OF.get(o, 99) >= FLOOR_OF[own]]
        assert not above, f"{module} imports from {above}"
    TopologicalSorter({module: imports(module) for module in FILES}).prepare()  # raises CycleError


def test_rooms_are_few_and_small():
    assert {path.name for path in HOUSE.glob("*/")} - {"__pycache__"} == {*FLOOR_OF}
    for folder in (HOUSE, *HOUSE.rglob("*/")):
        entries = [path for path in folder.iterdir() if path.name not in ("__init__.py", "__pycache__")]
        allowed = 99 if folder.name in ("__pycache__", "published") else len(FLOOR_OF) + 13 if folder == HOUSE else 9
        assert len(entries) <= allowed, f"{folder} has {len(entries)} entries"
