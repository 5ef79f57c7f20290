"""Datasets: one a file, each a frozen dataclass whose `load()` gives the same Splits on every machine."""
