"""Traces that are shipped."""
