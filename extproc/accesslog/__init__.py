"""What Envoy reports by its gRPC access log, handed to whoever made the decision."""
