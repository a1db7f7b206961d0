"""What Envoy gets: clusters and endpoints by delta xDS."""
