"""Conversations that people have rated: what becomes of thumbs up and down. Kept here, shown, and deletable."""

from __future__ import annotations

import json
import math
import os
import re
import time
import uuid
from contextlib import suppress
from typing import TYPE_CHECKING, Any

from zoray.records import ConfigError
from zoray.serving.store import NotFound, public, read_all, write_json

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

MOST_PAIRED = 4  # disliked answers, the latest, that each liked answer to the same question is preferred to
ID = re.compile(r"talk-[0-9a-f]{24}")


class Conversations:
    """One small file each, in a folder of their own."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        folder.mkdir(parents=True, exist_ok=True)

    def add(
        self, messages: Sequence[dict[str, str]], up: bool, model: str, number: str | None = None
    ) -> dict[str, Any]:
        """Keep a conversation whose last message is the answer that was rated; `number` rates one that is kept anew.

        Raises:
            ConfigError: there is no question with an answer.
        """
        roles = [message["role"] for message in messages]
        if roles[-2:] != ["user", "assistant"] or not messages[-1]["content"].strip():
            raise ConfigError("expected messages that end with a question of the user and an answer of the assistant")
        if number is not None:
            self._path(number)
        found = {
            "id": number or f"talk-{uuid.uuid4().hex[:24]}",
            "created_at": time.time(),
            "messages": list(messages),
            "up": up,
            "model": model,
        }
        write_json(self._folder / f"{found['id']}.json", found)
        return found

    @public
    def all(self) -> list[dict[str, Any]]:
        """All of them, the oldest first."""
        return sorted(read_all(self._folder.glob("talk-*.json")), key=lambda one: one["created_at"])

    def latest(self, most: int) -> list[dict[str, Any]]:
        """The last ones, the oldest of them first."""
        names = [name for _, name, _ in sorted(self._entries())[-most:]]
        return list(read_all(self._folder / name for name in names))

    def ids(self) -> list[str]:
        """Of all of them."""
        return [name.removesuffix(".json") for _, name, _ in self._entries()]

    @property
    def bytes(self) -> int:
        """What they take on disk."""
        return sum(size for _, _, size in self._entries())

    def delete_everything(self) -> None:
        """Delete all of them from disk, those that were never finished among them."""
        for path in self._folder.iterdir():
            path.unlink(missing_ok=True)

    def _entries(self) -> list[tuple[int, str, int]]:
        """When each was rated last, its file's name and size."""
        found = []
        for entry in os.scandir(self._folder):
            if entry.name.startswith("talk-"):
                with suppress(FileNotFoundError):  # deleted just now
                    found.append(((stat := entry.stat()).st_mtime_ns, entry.name, stat.st_size))
        return found

    @public
    def delete(self, number: str) -> None:
        """Delete one from disk."""
        self._path(number).unlink(missing_ok=True)

    def rows(self, most: float = math.inf) -> bytes:
        """What there is to learn from them, as lines of JSON, the latest of them if it is more than `most` bytes.

        Where answers to the same question have been liked and disliked, these are preferences, and only they are used;
        else the liked answers are examples to imitate.

        Raises:
            ConfigError: nobody has liked anything.
        """
        liked: dict[str, list[Any]] = {}
        disliked: dict[str, list[Any]] = {}
        for one in self.all():
            *before, answer = one["messages"]
            key = json.dumps(before, ensure_ascii=False)
            (liked if one["up"] else disliked).setdefault(key, []).append(answer["content"])
        pairs = [
            {"prompt": json.loads(key), "chosen": good, "rejected": bad}
            for key, answers in liked.items()
            for good in answers
            for bad in disliked.get(key, [])[-MOST_PAIRED:]
            if good.strip() != bad.strip()
        ]
        if len(pairs) >= 3:
            return _lines(pairs, most)
        if len(liked) < 3:
            raise ConfigError(f"expected at least 3 conversations with thumbs up to learn from; got {len(liked)}")
        rows = [{"messages": [*json.loads(key), {"role": "assistant", "content": a[-1]}]} for key, a in liked.items()]
        return _lines(rows, most)

    def _path(self, number: str) -> Path:
        path = self._folder / f"{number}.json"
        if not ID.fullmatch(number) or not path.exists():
            raise NotFound("there is no such conversation")
        return path


def _lines(rows: Sequence[Any], most: float) -> bytes:
    lines: list[bytes] = []
    left = most
    for row in reversed(rows):
        line = json.dumps(row, ensure_ascii=False).encode() + b"\n"
        if (left := left - len(line)) < 0:
            break
        lines.append(line)
    return b"".join(reversed(lines))
