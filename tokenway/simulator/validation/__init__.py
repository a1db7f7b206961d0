"""Measured runs of real engines: played again in the engine core, compared, and fitted to."""
