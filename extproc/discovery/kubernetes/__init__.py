"""Endpoints from the Kubernetes API: pods of an InferencePool or of a selector, EndpointSlices of Services."""
