"""Where a gateway is reached: sockets and ports, what serves them, and the folder that they are in."""
