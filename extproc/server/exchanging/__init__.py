"""What workers of a gateway and gateways of a deployment tell each other."""
