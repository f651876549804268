"""Measurements of speed, memory and methods; not in the installed package. `python launch/benchmark.py --help`."""
