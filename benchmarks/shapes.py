"""Models made up in code: the config of a real shape, or of a tiny one of the same family; no tokenizer.

Without weights they load as random ones (engine.load_format=dummy). `with_weights` writes some, for what has to be
compared between two engines.
"""

from __future__ import annotations

import json
import shutil
import tempfile
from pathlib import Path
from typing import Any

from safetensors.numpy import save_file

from zoray.records import ConfigError

OPT = {  # hidden, layers, heads; Zhang et al., arXiv 2205.01068, table 1
    "opt-125m": (768, 12, 12),
    "opt-1.3b": (2048, 24, 32),
    "opt-2.7b": (2560, 32, 32),
    "opt-6.7b": (4096, 32, 32),
    "opt-13b": (5120, 40, 40),
    "opt-tiny": (64, 2, 2),
}
GATED = {  # family, hidden, inner, layers, heads, KV heads, head size, vocabulary, dtype; the published config.json
    "llama-3-8b": ("llama", 4096, 14336, 32, 32, 8, 128, 128256, "bfloat16"),
    "qwen3-4b": ("qwen3", 2560, 9728, 36, 32, 8, 128, 151936, "bfloat16"),
    "llama-125m": ("llama", 768, 2048, 12, 12, 4, 64, 32000, "bfloat16"),
    "llama-tiny": ("llama", 64, 128, 2, 2, 1, 32, 512, "float32"),
    "qwen3-tiny": ("qwen3", 64, 128, 2, 2, 1, 32, 512, "float32"),
}
NAMES = (*OPT, *GATED)


def config_of(name: str) -> dict[str, Any]:
    """The config.json of a shape.

    Raises:
        ConfigError: there is no such shape.
    """
    if name in OPT:
        hidden, layers, heads = OPT[name]
        return {
            "architectures": ["OPTForCausalLM"],
            "model_type": "opt",
            "vocab_size": 512 if name == "opt-tiny" else 50272,
            "hidden_size": hidden,
            "ffn_dim": 4 * hidden,
            "num_hidden_layers": layers,
            "num_attention_heads": heads,
            "word_embed_proj_dim": hidden,
            "max_position_embeddings": 2048,
            "do_layer_norm_before": True,
            "activation_function": "relu",
            "torch_dtype": "float16",
            "bos_token_id": 2,
            "eos_token_id": 2,
            "pad_token_id": 1,
            "tie_word_embeddings": True,
        }
    if name not in GATED:
        raise ConfigError(f"expected model to be smollm2 or one of {', '.join(NAMES)}; got {name!r}")
    family, hidden, inner, layers, heads, kv_heads, head_dim, vocabulary, dtype = GATED[name]
    return {
        "architectures": [{"llama": "LlamaForCausalLM", "qwen3": "Qwen3ForCausalLM"}[family]],
        "model_type": family,
        "vocab_size": vocabulary,
        "hidden_size": hidden,
        "intermediate_size": inner,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "head_dim": head_dim,
        "hidden_act": "silu",
        "max_position_embeddings": 8192 if family == "llama" else 40960,
        "rms_norm_eps": 1e-5 if family == "llama" else 1e-6,
        "rope_theta": 500000.0 if family == "llama" else 1000000.0,
        "torch_dtype": dtype,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "tie_word_embeddings": family == "qwen3",
    }


def vocabulary(name: str) -> int:
    """Tokens of a shape's vocabulary."""
    return int(config_of(name)["vocab_size"])


def make_model(name: str, folder: Path) -> Path:
    """Write a shape's config.json into a folder, and a file that stands for the weights."""
    config = config_of(name)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    save_file({}, folder / "model.safetensors")  # it has a hash as well
    return folder


def with_weights(name: str, folder: Path, seed: int = 0) -> Path:
    """Write a shape with float32 weights, drawn on the CPU; such that tokens differ clearly in their probability.

    Processes that want the same folder may do so at once: it is there as a whole or not at all.
    """
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    if folder.exists():
        return folder
    folder.parent.mkdir(parents=True, exist_ok=True)
    partial = make_model(name, Path(tempfile.mkdtemp(prefix=f".{folder.name}.", dir=folder.parent)))
    random = torch.Generator().manual_seed(seed)
    with torch.random.fork_rng():
        model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(partial), dtype=torch.float32)
    for parameter in model.parameters():
        if parameter.ndim == 2:
            torch.nn.init.normal_(parameter, std=1.6 * parameter.shape[1] ** -0.5, generator=random)
    model.save_pretrained(partial)
    try:
        partial.rename(folder)
    except OSError:  # somebody was first
        shutil.rmtree(partial)
    return folder
