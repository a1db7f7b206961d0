"""What tests and benchmarks start beside Tokenway: Redis, vLLM, control planes, tokenizers, processes."""
