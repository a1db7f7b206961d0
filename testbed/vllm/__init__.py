"""A real vLLM: its environment in `.tools/vllm`, and one replica on one CPU core."""
