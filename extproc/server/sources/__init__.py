"""Sources of endpoints that have connections: istiod and the Kubernetes API."""
