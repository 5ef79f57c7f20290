"""Calls reward functions, yours too: finds them by name, and runs them in processes that may hang or die."""
