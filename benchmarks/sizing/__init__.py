"""What the shared metadata center costs: single things, a table of them, gateways that run."""
