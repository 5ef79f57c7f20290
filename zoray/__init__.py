"""Zeroth-order fine-tuning of language models, run as inference on vLLM and Ray."""

__version__ = "0.1.0"
