"""Hostile files for every reader, as a table of cases: `python -m tests.attack`."""
