"""What residual feedback needs of an engine: what a pass keeps, the stream's gradient, and the maps of layers."""
