"""From a row's cells to an example."""
