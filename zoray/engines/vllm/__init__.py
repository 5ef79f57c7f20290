"""The vLLM engine: its configuration, and what runs inside its worker."""
