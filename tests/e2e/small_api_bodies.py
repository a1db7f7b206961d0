"""What is asked of the APIs that are neither chat nor completion, but for the model."""

from __future__ import annotations

from typing import Any

MESSAGES = [{"role": "user", "content": "hello"}]

BODIES: dict[str, dict[str, Any]] = {
    "/v1/responses/compact": {"input": MESSAGES},
    "/v1/responses/input_tokens": {"input": "hello"},
    "/v1/messages/count_tokens": {"messages": MESSAGES},
    "/tokenize": {"prompt": "hello"},
    "/v1/tokenize": {"prompt": "hello"},
    "/detokenize": {"tokens": [1, 2, 3]},
    "/v1/detokenize": {"tokens": [1, 2, 3]},
    "/rerank": {"query": "which?", "documents": ["one", "two"]},
    "/v1/rerank": {"query": "which?", "documents": ["one", "two"]},
    "/v2/rerank": {"query": "which?", "documents": ["one", "two"]},
    "/score": {"text_1": "which?", "text_2": ["one", "two"]},
    "/v1/score": {"text_1": "which?", "text_2": ["one", "two"]},
    "/classify": {"input": "hello"},
    "/v1/classify": {"input": "hello"},
    "/pooling": {"input": "hello"},
}
