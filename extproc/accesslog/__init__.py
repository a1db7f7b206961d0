"""What Envoy reports by its gRPC access log, handed to the worker that decided."""
