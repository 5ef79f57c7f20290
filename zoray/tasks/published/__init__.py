"""Published data sets, one a file."""
