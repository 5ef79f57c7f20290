"""One vLLM engine that answers people and tunes: who gets which step, and for how long."""
