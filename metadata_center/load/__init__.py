"""Load in flight: the ledger, and the counters that all workers of a gateway share."""
