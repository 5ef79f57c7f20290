"""A served model that learns while it answers: an OpenAI-compatible API, and tuning on the same engine."""
