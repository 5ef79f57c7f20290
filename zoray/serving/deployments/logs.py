"""A server's error logs: log/<part>.log in its folder, two files of a megabyte for each part of the server.

They hold no request and no user's data, only the types of errors and where in the code they were raised.
"""

from __future__ import annotations

import logging
from contextlib import suppress
from logging.handlers import RotatingFileHandler
from pathlib import Path

LOG = "log"  # in the server's folder
MOST = 1 << 20  # bytes of a file


def keep_log(folder: Path | str, part: str) -> None:
    """Write this process's zoray log to a file; lines that the disk refuses go to stderr, which Ray keeps."""
    path = Path(folder) / LOG / f"{part}.log"
    with suppress(OSError):
        path.parent.mkdir(parents=True, exist_ok=True)
    handler = RotatingFileHandler(path, maxBytes=MOST, backupCount=1, encoding="utf-8", delay=True)
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))
    logging.getLogger("zoray").addHandler(handler)
