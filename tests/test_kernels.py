"""The Triton kernels under Triton's interpreter, without a card: the bits that torch makes, and what is refused."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch

from zoray import kernels
from zoray.records import ConfigError

SCRIPT = """
import torch
from zoray import directions
from zoray.directions import Layout

shapes = {"q": (5, 8), "v": (16, 8), "up": (33, 4), "head": (3, 129), "tail": (1, 1), "whole": (16, 32)}
for distribution in ("rademacher", "gaussian"):
    for seed, step, probes in ((7, 5, (0, 1, 9)), (2**32 - 1, 2**31 + 5, (2**32 - 1, 0)), (0, 0, (0,))):
        directions.has_kernels = lambda device: False
        expected = Layout(shapes).directions(seed, step, probes, distribution)
        directions.has_kernels = lambda device: True
        layout = Layout(shapes)
        found = layout.directions(seed, step, probes, distribution)
        assert layout._filler is not None and found.dtype == expected.dtype
        print(torch.equal(found, expected), float(found.abs().sum()) > 0)
        for name in shapes:
            alone = Layout({name: shapes[name]})
            assert torch.equal(alone.views(alone.directions(seed, step, probes, distribution), name),
                               layout.views(expected, name))
print(Layout({}).directions(0, 0, (1, 2), "gaussian").shape)
"""


def test_directions_have_the_bits_that_torch_makes():
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT],
        env={**os.environ, "TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == ["True True"] * 6 + ["torch.Size([2, 0])"]


def test_a_tensor_that_its_counters_could_not_number_is_refused():
    with pytest.raises(ConfigError, match=r"less than 2\*\*31 elements"):
        kernels.Filler([2**31], [0], torch.device("cpu"))
