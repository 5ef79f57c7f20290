"""The differences between vLLM 0.26 (the CUDA lock) and 0.32 (the CPU lock) in the parts that zoray calls.

The rest of engines/ works the same with both. Any other version is treated like the newer one; selftest.py checks on
the loaded model what zoray relies on, for every version.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any

import numpy as np
import torch
from vllm.v1.attention.backend import CommonAttentionMetadata


def attention_metadata(group: Any, common: CommonAttentionMetadata) -> Any:
    """The attention metadata in the form of a group of layers.

    0.32 maps block tables to the kernel's blocks in a helper; 0.26 has only the builder behind it.
    """
    build = getattr(group, "build_metadata", None)
    return build(common, 0) if build else group.get_metadata_builder(0).build(0, common)


def known_fields(
    lengths: np.ndarray, context: np.ndarray, positions: np.ndarray, device: torch.device
) -> dict[str, Any]:
    """The fields of CommonAttentionMetadata that not every version has.

    Args:
        lengths: (S,) int32, tokens of each sequence in this forward.
        context: (S,) int32, tokens before them.
        positions: (T,) int64.
        device: the model's.
    """
    whole = torch.from_numpy(lengths + context)
    fields: dict[str, Any] = {
        "positions": torch.from_numpy(positions).to(device),
        "is_prefilling": torch.ones(len(lengths), dtype=torch.bool),
        "seq_lens_cpu_upper_bound": whole,
        "_seq_lens_cpu": whole,
        "_num_computed_tokens_cpu": torch.from_numpy(context),
    }
    return {name: value for name, value in fields.items() if name in CommonAttentionMetadata.__dataclass_fields__}


def server_arguments() -> Any:
    """The default arguments of vLLM's own server; their parser has moved between versions."""
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    try:
        found = import_module("vllm.entrypoints.launchers.cli_args")
    except ImportError:  # 0.26
        found = import_module("vllm.entrypoints.openai.cli_args")
    return found.make_arg_parser(FlexibleArgumentParser()).parse_args([])
