"""A served model that learns while it answers: an OpenAI-compatible API, and tuning on the same engine.

Imports all other rooms. The gateway, the tuner and each engine are Ray Serve deployments, one process each; the page
is plain files.
"""

from zoray import faces

__getattr__ = faces(
    __name__,
    {"build": "deployments.application", "Settings": "settings", "Gate": "gate"},
)
