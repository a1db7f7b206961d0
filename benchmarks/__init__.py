"""Benchmarks: one command each, the last line a JSON object."""
