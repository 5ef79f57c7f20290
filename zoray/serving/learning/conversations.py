"""Conversations that people have rated, thumbs up or down: kept, shown, deleted, and made into training rows."""

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

MOST_PAIRED = 4  # latest disliked answers that each liked answer to the same question is paired with
ID = re.compile(r"talk-[0-9a-f]{24}")


class Conversations:
    """The rated conversations, one small file each, in their own folder."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        folder.mkdir(parents=True, exist_ok=True)

    def add(
        self, messages: Sequence[dict[str, str]], up: bool, model: str, number: str | None = None
    ) -> dict[str, Any]:
        """Keep a conversation whose last message is the rated answer; with `number`, rate a kept one again.

        Raises:
            ConfigError: the messages do not end with a question and an answer.
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
        """All conversations, the oldest first."""
        return sorted(read_all(self._folder.glob("talk-*.json")), key=lambda one: one["created_at"])

    def latest(self, most: int) -> list[dict[str, Any]]:
        """The latest `most` conversations, the oldest of them first."""
        names = [name for _, name, _ in sorted(self._entries())[-most:]]
        return list(read_all(self._folder / name for name in names))

    def ids(self) -> list[str]:
        """The ids of all conversations."""
        return [name.removesuffix(".json") for _, name, _ in self._entries()]

    @property
    def bytes(self) -> int:
        """Their size on disk."""
        return sum(size for _, _, size in self._entries())

    def delete_everything(self) -> None:
        """Delete all conversations from disk, unfinished files included."""
        for path in self._folder.iterdir():
            path.unlink(missing_ok=True)

    def _entries(self) -> list[tuple[int, str, int]]:
        """Time of the last rating, file name and size of each."""
        found = []
        for entry in os.scandir(self._folder):
            if entry.name.startswith("talk-"):
                with suppress(FileNotFoundError):  # deleted just now
                    found.append(((stat := entry.stat()).st_mtime_ns, entry.name, stat.st_size))
        return found

    @public
    def delete(self, number: str) -> None:
        """Delete a conversation from disk."""
        self._path(number).unlink(missing_ok=True)

    def rows(self, most: float = math.inf) -> bytes:
        """Training rows from the conversations, as lines of JSON; the latest ones, if all exceed `most` bytes.

        Liked and disliked answers to the same question become preferences; if there are enough, only they are used.
        Else the liked answers are examples to imitate.

        Raises:
            ConfigError: too few conversations have thumbs up.
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
