"""Which endpoints exist, and telling Envoy."""
