"""Every Prometheus series of the gateway: families by what they are about, and the recorder."""
