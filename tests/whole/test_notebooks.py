"""Every notebook runs from top to bottom, and what is stored in it is what it prints."""

from __future__ import annotations

from pathlib import Path

import nbformat
import pytest
from jupyter_client import AsyncKernelManager
from jupyter_client.kernelspec import KernelSpecManager
from nbclient import NotebookClient

NOTEBOOKS = {path.name: path for path in sorted((Path(__file__).parents[2] / "notebooks").glob("*.ipynb"))}


def execute(path: Path, folder: Path) -> nbformat.NotebookNode:
    """A fresh run of a notebook in this interpreter's own kernel, whatever kernels the machine has."""
    notebook = nbformat.read(path, as_version=4)
    specs = KernelSpecManager(kernel_dirs=[], ensure_native_kernel=True)
    kernel = AsyncKernelManager(kernel_name="python3", kernel_spec_manager=specs)
    resources = {"metadata": {"path": str(folder)}}
    NotebookClient(notebook, timeout=200, km=kernel, coalesce_streams=True, resources=resources).execute()
    return notebook


def printed(notebook: nbformat.NotebookNode) -> list[str]:
    """What each code cell printed; an output that is not plain text on stdout fails the test."""
    texts = []
    for cell in notebook.cells:
        if cell.cell_type == "code":
            assert all(output.output_type == "stream" and output.name == "stdout" for output in cell.outputs)
            texts.append("".join(output.text for output in cell.outputs))
    return texts


def test_there_is_a_notebook():
    assert "01_one_step.ipynb" in NOTEBOOKS


@pytest.mark.parametrize("name", NOTEBOOKS)
def test_a_notebook_runs_and_stores_its_outputs(name, tmp_path):
    stored, fresh = nbformat.read(NOTEBOOKS[name], as_version=4), execute(NOTEBOOKS[name], tmp_path)
    nbformat.validate(stored)
    assert [bool(text) for text in printed(stored)] == [bool(text) for text in printed(fresh)]
    assert all(cell.source.strip() for cell in stored.cells)
    assert not any(word in NOTEBOOKS[name].read_text() for word in ("/home/", "/root/", "/tmp/", "/work/"))
    assert not list(tmp_path.iterdir())  # nothing is left behind
    if name == "01_one_step.ipynb":
        check_one_step(printed(stored), printed(fresh))


def check_one_step(stored: list[str], fresh: list[str]) -> None:
    """Directions have the same bits everywhere; scores do not, so digests are compared within a run."""
    (directions,) = [i for i, text in enumerate(fresh) if "NumPy == torch: True" in text]
    assert fresh[directions].count("True") == 2 and stored[directions] == fresh[directions]
    assert not any("False" in text for text in fresh)
    for texts in (stored, fresh):
        (line,) = [line for text in texts for line in text.splitlines() if line.startswith("by hand:")]
        assert line.split()[2] == line.split()[-1]
        digests = [line.split()[-1] for line in texts[-1].splitlines() if line.startswith("digest of the")]
        assert len(digests) == 2 and digests[0] == digests[1] != "0" * 16
        losses = [float(line.split()[-1]) for line in texts[-2].splitlines()]
        assert len(losses) == 3 and losses[2] < losses[1] < losses[0]
