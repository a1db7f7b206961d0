"""Which endpoints may be chosen."""
