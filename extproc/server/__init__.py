"""Building, running and stopping the gateway."""
