"""Rows of files, one reader a kind, and the faults that any of them can have."""
