"""Metrics, decision records, explain, logs."""
