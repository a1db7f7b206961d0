"""What tests and benchmarks start beside Tokenway: Redis, a real vLLM, a tokenizer, child processes."""
