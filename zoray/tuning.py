"""`python -m zoray.tuning VERB`: tuning jobs and versions of a running server; serving/commands.py has the verbs."""

from __future__ import annotations

import sys

from zoray.records.process import streams
from zoray.serving.commands import main

if __name__ == "__main__":
    streams.settle()
    sys.exit(main())
