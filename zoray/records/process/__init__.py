"""What the shell of a main decides: its standard streams, its locale, and the signals that end it."""
