"""A vLLM look-alike: a pure engine step model, and an HTTP server that behaves as vLLM does on the wire."""
