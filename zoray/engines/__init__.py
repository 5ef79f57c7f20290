"""Engines score token sequences under adapters: `vllm` on the serving engine, `hf` as the slow exact reference."""
