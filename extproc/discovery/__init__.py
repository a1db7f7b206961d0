"""Which endpoints exist: what comes in, from whichever source."""
