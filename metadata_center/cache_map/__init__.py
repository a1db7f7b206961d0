"""Which replica holds which prompt text in its KV cache, as the engines themselves announce it."""
