"""Calling reward functions, other people's too: found by name, called in processes that may hang or die."""
