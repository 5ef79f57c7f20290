"""Which parameters move, and how a direction becomes an adapter: one space a file."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any

from zoray.methods.spaces.base import Space, State
from zoray.methods.spaces.lora import Lora, LoraState
from zoray.methods.spaces.lowrank import LowRank, LowRankState
from zoray.methods.spaces.lozo import Lozo, LozoState
from zoray.records import JournalError

if TYPE_CHECKING:
    from collections.abc import Mapping

__all__ = ["Lora", "LoraState", "LowRank", "LowRankState", "Lozo", "LozoState", "Space", "State", "from_record"]


def from_record(record: Mapping[str, Any]) -> Any:
    """A space from its record in a journal's header: {"name": class name, fields...}. Imports nothing by name."""
    known: dict[str, Any] = {space.__name__: space for space in (Lora, Lozo, LowRank)}
    fields = {key: value for key, value in record.items() if key != "name"}
    space = known.get(record["name"])
    if space is None or not fields.keys() <= {field.name for field in dataclasses.fields(space)}:
        raise JournalError(
            f"expected a space that this version knows ({', '.join(known)}); "
            f"got {record['name']!r} with {sorted(fields)}"
        )
    return space(**fields)
