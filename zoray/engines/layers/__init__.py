"""vLLM's layers with adapters beside them: products, gated MLPs and norms, on the CPU and on CUDA."""
