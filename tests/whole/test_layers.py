"""The layers, read from the sources: who may import which library, what stays light, and how text is read."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from fnmatch import fnmatch
from pathlib import Path

import pytest

SOURCES = Path(__file__).parents[2] / "zoray"
BENCHMARKS = sorted((SOURCES.parent / "benchmarks").rglob("*.py"))
FILES = {str(path.relative_to(SOURCES)): path for path in sorted(SOURCES.rglob("*.py"))}

ALLOWED = {  # library -> where it may be imported
    "ray": ["pool/on_ray/*", "serving/*"],
    "vllm": ["engines/*"],
    "triton": ["methods/directions_cuda.py"],
    "hydra": ["run/config.py"],
    "fastapi": ["serving/http/routes.py"],
    "omegaconf": ["run/config.py", "run/folder.py", "launch.py"],
}
LIGHT = [
    "records.process.streams",
    "records.paths",
    "records",
    "methods.directions",
    "methods.estimators",
    "methods.optimizers",
    "scoring.objectives",
    "scoring.rewards.judging.judge",
    "tasks.made_up.countdown",
    "run.journal",
    "run.experiment",
    "run.reports.history",
    "run.reports.monitor",
    "run.config",
    "serving.settings",
    "tuning",
]
HEAVY = {"torch", "vllm", "ray", "hydra", "transformers"}


def imports(source: str) -> set[str]:
    """The dotted names that a source imports anywhere: in functions and under TYPE_CHECKING too."""
    names = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute here"
            names |= {node.module or "", *(f"{node.module}.{alias.name}" for alias in node.names)}
    return names


def test_imports_are_found_wherever_they_stand():
    source = "import a.b\nfrom c import d\nif TYPE_CHECKING:\n    import e\ndef f():\n    from g.h import i as j\n"
    assert imports(source) == {"a.b", "c", "c.d", "e", "g.h", "g.h.i"}


@pytest.mark.parametrize("library", ALLOWED)
def test_a_library_is_imported_only_where_it_belongs(library):
    users = [name for name, path in FILES.items() if library in {i.split(".")[0] for i in imports(path.read_text())}]
    assert users, "nobody imports it: the rule is out of date"
    assert [name for name in users if not any(fnmatch(name, pattern) for pattern in ALLOWED[library])] == []


def test_no_file_is_over_500_lines():
    assert [name for name, path in FILES.items() if len(path.read_text("utf-8").splitlines()) > 500] == []


def texts_in_the_encoding_of_the_day(source: str) -> list[int]:
    """Lines of calls that read or write text without saying how; but for files that say they are binary."""
    lines = []
    for node in ast.walk(ast.parse(source)):
        if not isinstance(node, ast.Call):
            continue
        method = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
        given = {keyword.arg: getattr(keyword.value, "value", None) for keyword in node.keywords}
        values = [getattr(argument, "value", None) for argument in node.args] + [given.get("mode")]
        texts = method in ("read_text", "write_text") or given.get("text") is True
        mode = next((value for value in values if isinstance(value, str) and re.fullmatch("[rwxab+t]{1,4}", value)), "")
        on_path = isinstance(node.func, ast.Attribute) and not values[:-1]
        opens = method == "open" and ast.unparse(node.func) != "tarfile.open"
        texts |= opens and "b" not in mode and (bool(mode) or isinstance(node.func, ast.Name) or on_path)
        if texts and "encoding" not in given:
            lines.append(node.lineno)
    return lines


def test_texts_without_an_encoding_are_found():
    source = 'a.read_text()\nb.open("w")\nrun(x, text=True)\nopen(a)\nc.open("ab")\nopen(a, "rb")\nd.write_text(e)\n'
    source += 'f.open(encoding="utf-8")\nspace.open(matrices, 0)\ng.open()\n'
    assert texts_in_the_encoding_of_the_day(source) == [1, 2, 3, 4, 7, 10]


def test_text_is_utf8_whatever_the_locale():
    found = {path: texts_in_the_encoding_of_the_day(path.read_text("utf-8")) for path in [*FILES.values(), *BENCHMARKS]}
    assert {path: lines for path, lines in found.items() if lines} == {}


def test_light_modules_import_nothing_heavy():
    """In one process, which stops at the first module that brings a heavy one along."""
    code = "import sys, importlib\nfor name in sys.argv[1:]:\n    importlib.import_module(name)\n"
    code += f"    assert not {HEAVY} & set(sys.modules), name\n"
    command = [sys.executable, "-c", code, *(f"zoray.{name}" for name in LIGHT)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
