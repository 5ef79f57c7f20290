"""Your own data, from rows in files of many kinds to examples."""
