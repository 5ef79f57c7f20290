"""Does zoray do on this card what it does on a CPU, and how fast? See __main__.py."""
