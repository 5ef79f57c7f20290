"""Residual feedback in an engine: the rows that a pass keeps, the stream's gradient, and the maps of layers."""
