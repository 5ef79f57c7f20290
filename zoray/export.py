"""Adapter state -> PEFT adapter folder, that `peft` and vLLM load."""

from __future__ import annotations

import json
import os
import shutil
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from zoray.spaces import Lora


def write_peft(folder: Path, adapter: Mapping[str, np.ndarray], space: Lora, base_model: str) -> None:
    """Write `adapter_config.json` and `adapter_model.safetensors`; an earlier export there is replaced as a whole.

    Args:
        folder: the adapter's folder.
        adapter: {`<matrix>.lora_A`: (rank, in), `<matrix>.lora_B`: (out, rank)}, not scaled: PEFT applies alpha / rank.
        space: its rank, alpha and matrices.
        base_model: what `adapter_config.json` names as the base.
    """
    from safetensors.numpy import save_file

    partial = folder.with_name(folder.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    matrices = sorted({name.rpartition(".")[0] for name in adapter})
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base_model,
        "r": space.rank,
        "lora_alpha": space.alpha,
        "lora_dropout": 0.0,
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
        "target_modules": sorted({name.rsplit(".", 1)[-1] for name in matrices}),
    }
    (partial / "adapter_config.json").write_text(json.dumps(config, indent=2) + "\n")
    tensors = {f"base_model.model.{name}.weight": np.ascontiguousarray(value) for name, value in adapter.items()}
    save_file(tensors, partial / "adapter_model.safetensors", metadata={"format": "pt"})
    shutil.rmtree(folder, ignore_errors=True)
    os.replace(partial, folder)
