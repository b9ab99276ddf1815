"""Timings beside peers, and their records: python -m benchmarks.ssd."""
