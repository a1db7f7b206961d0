"""Endpoints from the Kubernetes API: pods of a pool or of a selector, EndpointSlices of Services."""
