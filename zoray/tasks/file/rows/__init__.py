"""Rows of files, one reader per kind of file, and the faults that rows can have."""
