"""Tasks whose problems are made up on the spot, from a seed."""
