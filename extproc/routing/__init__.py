"""The decision and what became of it."""
