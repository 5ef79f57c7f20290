"""A model's folder: its source, whether it is complete, its weights, tokens and adapter files.

Imports records and methods. Every process reads the same folder: the driver to check a run, a replica to load it, the
server to tokenise requests.
"""

from zoray import faces

__getattr__ = faces(
    __name__,
    {"Model": "folder"},
)
