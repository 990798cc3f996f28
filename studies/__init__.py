"""Studies: one folder each, found by name and run by `lowprec study NAME`."""
