"""A model with adapter slots that scores sequences: `vllm`, the serving engine, and `hf`, the slow exact reference.

An engine knows token sequences and slots, no task and no pool. Imports records, methods and models; only this room
imports vLLM. An engine lives in its replica's process; a server's engine has its core in another process.
"""

from zoray import faces

__getattr__ = faces(
    __name__,
    {"Vllm": "vllm.engine", "Hf": "hf"},
)
