"""The product's own policies as the replayer runs them, and the names of all that it compares."""
