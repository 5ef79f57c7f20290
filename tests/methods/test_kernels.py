"""The Triton kernels under Triton's interpreter, without a card: the bits that torch makes, and what is refused."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch

from zoray.methods import directions_cuda as kernels
from zoray.records import ConfigError

SCRIPT = """
import torch
from zoray.methods import directions
from zoray.methods.directions import Layout

directions.FEW_BLOCKS = 0
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


def interpreted(script: str) -> list[str]:
    """What a script prints under Triton's interpreter, which has to be chosen before Triton is imported."""
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    command = [sys.executable, "-c", script]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


def test_directions_have_the_bits_that_torch_makes():
    assert interpreted(SCRIPT) == ["True True"] * 6 + ["torch.Size([2, 0])"]


SLOTS_SCRIPT = """
import sys
import torch
from zoray.methods import directions
from zoray.engines import slots as module
from zoray.records import Commit, Probe
from zoray.methods.spaces import Lora, LowRank, Lozo

matrices = {"q": (10, 7), "k": (5, 7), "up": (300, 33)}
first, most, wide = 1, 4, 8  # slot to begin with, slots, rank of the slots
spaces = [Lora(rank=3, alpha=5), Lora(rank=8, alpha=4, train="AB", distribution="gaussian"), Lozo(rank=2),
          Lozo(rank=2, distribution="rademacher"), LowRank(rank=3), LowRank(rank=1, distribution="rademacher")]

def slots_of(dtype, transposed, part):
    sites = {}
    for name, (out, into) in matrices.items():
        rows, columns = (range(3, out - 1), range(2, into)) if part else (range(out), range(into))
        out, into = len(rows), len(columns)
        b = torch.full((most, 1, out, wide), 7.0, dtype=dtype)
        if transposed:  # as dense products have it
            b = torch.full((most, wide, out), 7.0, dtype=dtype).transpose(1, 2).unsqueeze(1)
        sites[name] = module.Site(torch.full((most, 1, wide, into), 7.0, dtype=dtype), b, rows, columns)
    return sites

for space in spaces:
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        weights = {name: torch.randn(shape) for name, shape in matrices.items()}
        state = space.open(matrices, 11, "cpu", weights)
        state.apply(Commit(0, (0.3, -0.7)))
        probes = [Probe(1, 0, 0.01), Probe(1, 0, -0.01), Probe(1, 5, 0.0)]
        part = dtype == torch.float32  # as under tensor parallelism
        kinds = (dtype != torch.float16, False, False)
        found, expected, single = (module.Slots(space, slots_of(dtype, kind, part)) for kind in kinds)
        for slots, has, staged in ((found, True, 0), (expected, False, 1 << 26), (single, False, 0)):
            directions.has_kernels = module.has_kernels = lambda device, has=has: has
            module.STAGED_ELEMENTS = staged
            for _ in range(2):  # the second time A may be there already
                slots.write(state, probes, first)
        assert found._writers and not expected._writers and expected._staged and not single._staged
        for name in matrices:
            for ours, theirs, third in zip(*(slots.sites[name][:2] for slots in (found, expected, single))):
                assert torch.equal(ours, theirs), (space, dtype, name, (ours.float() - theirs.float()).abs().max())
                assert torch.equal(third, theirs)
                assert not torch.equal(ours[1], ours[2]) or ours is found.sites[name].a
        print("equal")
"""


def test_slots_get_what_torch_writes():
    """By the kernel, from a buffer, one by one: every space and dtype of slots, with ranks that slots exceed."""
    assert interpreted(SLOTS_SCRIPT) == ["equal"] * 18


def test_a_tensor_that_its_counters_could_not_number_is_refused():
    with pytest.raises(ConfigError, match=r"less than 2\*\*31 elements"):
        kernels.Filler([2**31], [0], torch.device("cpu"))
