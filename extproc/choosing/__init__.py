"""Choosing an endpoint: filter, score, pick; pure functions over a snapshot."""
