"""The replayer: a trace through a simulated fleet in virtual time, one routing rule at a time."""
