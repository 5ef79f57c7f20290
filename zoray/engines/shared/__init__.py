"""One vLLM engine that answers requests and tunes: which of them gets each step, and for how long."""
