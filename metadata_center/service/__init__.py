"""The metadata center as a process of its own: AIGW's API, and the rendezvous of gateways without Redis."""
