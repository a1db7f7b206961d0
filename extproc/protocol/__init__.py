"""The ext_proc protocol: a sans-IO machine, the service that drives it, and the dialects it speaks."""
