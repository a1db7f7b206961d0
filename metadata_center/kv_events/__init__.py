"""What engines say about their KV caches: decoding, sequencing, discovering and subscribing to it."""
