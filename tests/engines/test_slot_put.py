"""An adapter that is put into a slot is there as the layers multiply it: scaled, the rank's own part, no other slot."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from zoray.engines.slots import Site, Slots
from zoray.methods.spaces import Lora


@pytest.mark.parametrize(("rows", "columns"), [(range(6), range(5)), (range(3, 6), range(2, 5))])  # all; one rank's
def test_an_adapter_is_put_into_its_slot_scaled(rows, columns):
    rng = np.random.default_rng(0)
    arrays = {"m.lora_A": rng.normal(size=(2, 5)).astype(np.float32), "m.lora_B": rng.normal(size=(6, 2))}
    site = Site(torch.full((3, 1, 4, len(columns)), 7.0), torch.full((3, 1, len(rows), 4), 7.0), rows, columns)
    Slots(Lora(rank=2, alpha=6.0), {"m": site}).put(1, arrays)
    assert np.array_equal(site.a[1, 0, :2].numpy(), arrays["m.lora_A"][:, columns.start : columns.stop])
    expected = 3.0 * arrays["m.lora_B"][rows.start : rows.stop]  # alpha / rank
    assert site.b[1, 0, :, :2].numpy() == pytest.approx(expected, rel=1e-6)
    for slot in (0, 2):
        assert (site.a[slot] == 7).all() and (site.b[slot] == 7).all()
    assert (site.a[1, 0, 2:] == 7).all() and (site.b[1, 0, :, 2:] == 7).all()
