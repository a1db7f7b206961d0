"""The wire side of the simulator: HTTP, server-sent events, metrics and KV events as vLLM 0.32 has them."""
