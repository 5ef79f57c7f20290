"""Questions about zoray, one a file; each prints one JSON object as its last line. See docs/benchmarks.md."""
