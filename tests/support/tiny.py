"""Tiny random models with a real tokenizer, for tests: seconds to make, and both vLLM and transformers load them.

Weights are large (std 0.2), so that logits differ clearly between tokens and a small perturbation shows. The head size
is 32 because vLLM's CPU attention does not take every small one.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from zoray.records import Probe, TokenSequence

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedTokenizerFast

VOCAB, MAX_LENGTH = 512, 256
SPECIAL = ["<unk>", "<s>", "</s>", "<pad>"]  # ids 0..3
TEXT = [
    "It was terrible",
    "It was great",
    "the film is a wonderful thing to see",
    "a dull and lifeless story, and far too long",
    "I liked the music. I did not like the plot!",
    "one of the best movies of the year",
]


IDS = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 3}
GROUPED: dict[str, Any] = {  # the shape of Llama and its kin, with grouped-query attention
    "vocab_size": VOCAB,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "max_position_embeddings": MAX_LENGTH,
    "initializer_range": 0.2,
}


def tiny_tokenizer(bos: bool = False) -> PreTrainedTokenizerFast:
    """A byte-level BPE. " terrible" and " great" are one token, " wonderful thing" several; `bos` puts `<s>` first."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB,
        special_tokens=SPECIAL,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(TEXT[:2] * 100 + TEXT, trainer)
    if bos:
        tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="<unk>", bos_token="<s>", eos_token="</s>", pad_token="<pad>"
    )


def tiny_llama(folder: str | Path, seed: int = 0) -> Path:
    """Two Llama layers, grouped-query attention, no bias; its tokenizer adds no bos."""
    from transformers import LlamaConfig

    config = LlamaConfig(
        **GROUPED,
        head_dim=32,
        tie_word_embeddings=False,
        **IDS,
    )
    return _save(config, folder, seed, bos=False)


def tiny_opt(folder: str | Path, seed: int = 0) -> Path:
    """Two OPT layers, with biases; as with the real OPT, the tokenizer puts a token before every text."""
    from transformers import OPTConfig

    config = OPTConfig(
        vocab_size=VOCAB,
        hidden_size=64,
        ffn_dim=128,
        num_hidden_layers=2,
        num_attention_heads=2,
        word_embed_proj_dim=64,
        do_layer_norm_before=True,
        max_position_embeddings=MAX_LENGTH,
        init_std=0.2,
        dropout=0.0,
        **IDS,
    )
    return _save(config, folder, seed, bos=True)


def tiny_qwen2(folder: str | Path, seed: int = 0) -> Path:
    """Two Qwen2 layers: as Llama, with biases on q, k and v, and one weight for embedding and LM head."""
    from transformers import Qwen2Config

    config = Qwen2Config(
        **GROUPED,
        tie_word_embeddings=True,
        **IDS,
    )
    return _save(config, folder, seed, bos=False)


def tiny_gemma3(folder: str | Path, seed: int = 0) -> Path:
    """Two Gemma 3 layers: norms before and behind attention and MLP, whose weights are less one; sliding windows."""
    from transformers import Gemma3TextConfig

    config = Gemma3TextConfig(
        **GROUPED,
        head_dim=32,
        query_pre_attn_scalar=32,
        sliding_window=16,
        layer_types=["sliding_attention", "full_attention"],
        tie_word_embeddings=True,
        **IDS,
    )
    return _save(config, folder, seed, bos=True)


def tiny_work(step: int) -> list[tuple[Probe, TokenSequence]]:
    """Sequences of three lengths under the centre and three probes of a step, two targets each."""
    random, work = np.random.default_rng(0), []
    for k in range(4):
        for length in (5, 17, 9):
            rows, targets = np.array([length - 2, length - 1]), np.array([7, 9])
            tokens = random.integers(5, 500, length).astype(np.int32)
            work.append((Probe(step, k, 0.1 * (k > 0)), TokenSequence(tokens, rows, targets, np.arange(2), 2)))
    return work


def _save(config: PretrainedConfig, folder: str | Path, seed: int, bos: bool) -> Path:
    import torch
    from transformers import AutoModelForCausalLM

    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):  # transformers starts them at zero, which would hide a missing bias
                torch.nn.init.normal_(parameter, std=0.1)
    model.save_pretrained(folder)
    tiny_tokenizer(bos).save_pretrained(folder)
    return Path(folder)
