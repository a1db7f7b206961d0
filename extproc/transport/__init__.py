"""gRPC as the services see it, and what serves it."""
