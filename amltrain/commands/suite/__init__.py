"""Measure everything that BENCHMARKS.md reports, on one machine in one command (`amltrain benchmark suite`)."""
