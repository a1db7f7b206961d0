"""The ext_proc protocol: a sans-IO machine, its wire form, and the gRPC loop around it."""
