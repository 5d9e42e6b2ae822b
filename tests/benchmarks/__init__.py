"""Benchmarks: programs that measure one thing each, and `bench.py`, which runs ours and the peers' side by side."""
