"""vLLM's layers and their adapters: products, gated MLPs and norms, on the CPU and on CUDA."""
