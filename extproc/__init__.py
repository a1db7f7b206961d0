"""The gateway: an Envoy external processor that chooses the endpoint of each LLM request."""
