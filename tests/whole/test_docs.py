"""The pages: links lead somewhere, files and commands that they name are there, and README.md stays short."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PAGES = [
    *(ROOT / name for name in ("README.md", "CONTRIBUTING.md", "cluster/kuberay/README.md")),
    *sorted((ROOT / "docs").glob("*.md")),
]
FILE = re.compile(r"(?<![\w./-])[\w.-]+(?:/[\w.-]+)*\.(?:py|yaml|sbatch|md|ipynb|lock)\b(?!/)")
MADE_UP = re.compile(r"\b(NAME|CLUSTER)\b|\b(name|my_reward|mail)\.|^(report|notes)\b")  # the reader's own
each_page = pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))


def prose(page: Path) -> str:
    """A page without its blocks of code."""
    return re.sub(r"```.*?```", "", page.read_text("utf-8"), flags=re.S)


def anchors(page: Path) -> set[str]:
    """What a link may name behind #, as GitHub makes it of headings."""
    headings = re.findall(r"^#+ (.*)$", prose(page), re.M)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@each_page
def test_links_lead_somewhere(page):
    for link in re.findall(r"\]\(([^)\s]+)\)", prose(page)):
        if not link.startswith("http"):
            path, _, anchor = link.partition("#")
            target = page.parent / path if path else page
            assert target.exists(), link
            assert not anchor or anchor in anchors(target), link


@each_page
def test_files_that_are_named_are_there(page):
    """By their path from the repository, from zoray/ or, next to a full path, from the folder that it names."""
    places = [ROOT, ROOT / "zoray", ROOT / "zoray" / "engines", page.parent]
    for code in re.findall(r"`([^`\n]+)`", prose(page)):
        for name in FILE.findall(code):
            if "/" in name and not MADE_UP.search(name):
                assert any((place / name).exists() for place in places), name


@each_page
def test_commands_that_are_named_are_there(page):
    for module in re.findall(r"python -m ((?:zoray|benchmarks)\.\w+)", page.read_text("utf-8")):
        path = ROOT / module.replace(".", "/")
        assert path.with_suffix(".py").exists() or (path / "__main__.py").exists() or "NAME" in module, module


def test_every_page_is_in_a_track():
    listed = set(re.findall(r"\]\((\w[\w-]*\.md)", (ROOT / "docs" / "README.md").read_text("utf-8")))
    assert listed == {page.name for page in (ROOT / "docs").glob("*.md")} - {"README.md"}


def test_the_readme_is_short():
    assert len((ROOT / "README.md").read_text("utf-8").splitlines()) <= 150
