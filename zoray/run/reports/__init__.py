"""What a run prints, draws and keeps for reading."""
