"""Zeroth-order fine-tuning of language models, run as inference on vLLM and Ray.

Nine rooms, each with one job: records, methods, models, engines, tasks, scoring, pool, run, serving. A room imports
only rooms before it in this list; engines and tasks not each other. The modules beside the rooms are the commands.
"""

from collections.abc import Callable
from typing import Any

__version__ = "0.1.0"


def faces(room: str, names: dict[str, str]) -> Callable[[str], Any]:
    """A `__getattr__` for a room: names that users write, as in `_target_: zoray.methods.Lora`.

    Each is imported on first use, so that a room stays light; and the name outlives moves within the room.

    Args:
        room: the room's `__name__`.
        names: name of a class or function -> the room's module that has it.
    """
    from importlib import import_module

    def find(name: str) -> Any:
        if name not in names:
            raise AttributeError(f"module {room!r} has no attribute {name!r}")
        return getattr(import_module(f"{room}.{names[name]}"), name)

    return find
