"""Real control planes for tests: built from their own Go modules, recorded, and the tools beside them."""
