"""What tests and benchmarks start beside Tokenway: Redis, a real vLLM, control planes, a tokenizer, child processes."""
