"""What Envoy is told: clusters and endpoints by delta xDS."""
