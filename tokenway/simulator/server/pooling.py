"""Answers without generated text: embeddings, scores, classes, ranks. Pure: prompts in, bodies out.

Rules:
    1. Shapes follow vLLM 0.32's protocol definitions.
    2. A result depends on every token of its prompt and on nothing else.
"""

from __future__ import annotations

import base64
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import xxhash

from tokenway.simulator.server.dialects import BadRequestError, conversation, prompt_ids
from tokenway.simulator.server.text import TokenArray, encode, encode_chat

EMBEDDING_DIMENSIONS = 16  # enough to distinguish inputs
_LABELS = ("negative", "neutral", "positive")


class Pooled(NamedTuple):
    """One pooling API.

    Attributes:
        id_prefix: Of its answers' ids.
        prompts: Token ids of each prompt of a body; raises `BadRequestError`.
        results: What is answered of them: fields beside id, model and usage.
    """

    id_prefix: str
    prompts: Callable[[Mapping[str, Any]], list[TokenArray]]
    results: Callable[[Mapping[str, Any], Sequence[TokenArray]], dict[str, Any]]


def _inputs(body: Mapping[str, Any]) -> list[TokenArray]:
    if body.get("messages") is not None:
        return [encode_chat(conversation(dict(body), "messages"))]
    given = body.get("input")
    if not (isinstance(given, list) and given and isinstance(given[0], str | list)):
        given = [given]
    try:
        return [prompt_ids(item) for item in given]
    except BadRequestError as error:
        raise BadRequestError(error.message, "input") from None


def _compared(first: str, second: str) -> Callable[[Mapping[str, Any]], list[TokenArray]]:
    """One prompt per pair; one text of the first side is compared with each of the second."""

    def prompts(body: Mapping[str, Any]) -> list[TokenArray]:
        left, right = (_texts(body, name) for name in (first, second))
        if len(left) == 1:
            left *= len(right)
        if len(left) != len(right):
            raise BadRequestError(f"{first} and {second} differ in length", second)
        return [np.concatenate((encode(one), encode(other))) for one, other in zip(left, right, strict=True)]

    return prompts


def _texts(body: Mapping[str, Any], name: str) -> list[str]:
    given = body.get(name)
    texts = [
        item.get("text") if isinstance(item, dict) else item
        for item in (given if isinstance(given, list) else [given])
    ]
    if not texts or not all(isinstance(text, str) for text in texts):
        raise BadRequestError(f"{name} must be text or a non-empty list of texts", name)
    return [str(text) for text in texts]


def _scored(body: Mapping[str, Any]) -> list[TokenArray]:
    names = ("queries", "documents") if "queries" in body else ("text_1", "text_2")
    return _compared(*names)(body)


def _embeddings(body: Mapping[str, Any], prompts: Sequence[TokenArray]) -> dict[str, Any]:
    as_base64 = body.get("encoding_format") == "base64"
    return _listed("embedding", "embedding", [embedding(prompt, as_base64) for prompt in prompts])


def _pooled(body: Mapping[str, Any], prompts: Sequence[TokenArray]) -> dict[str, Any]:
    as_base64 = body.get("encoding_format") == "base64"
    return _listed("pooling", "data", [embedding(prompt, as_base64) for prompt in prompts])


def _scores(_: Mapping[str, Any], prompts: Sequence[TokenArray]) -> dict[str, Any]:
    return _listed("score", "score", [_score(prompt) for prompt in prompts])


def _classes(_: Mapping[str, Any], prompts: Sequence[TokenArray]) -> dict[str, Any]:
    data = []
    for index, prompt in enumerate(prompts):
        weights = [_score(prompt, seed) + 0.01 for seed in range(len(_LABELS))]
        probs = [weight / sum(weights) for weight in weights]
        label = _LABELS[max(range(len(probs)), key=probs.__getitem__)]
        data.append({"index": index, "label": label, "probs": probs, "num_classes": len(probs)})
    return {"object": "list", "data": data}


def _ranks(body: Mapping[str, Any], prompts: Sequence[TokenArray]) -> dict[str, Any]:
    documents = _texts(body, "documents")
    results = [
        {"index": index, "document": {"text": document}, "relevance_score": _score(prompt)}
        for index, (document, prompt) in enumerate(zip(documents, prompts, strict=True))
    ]
    results.sort(key=lambda result: -float(str(result["relevance_score"])))
    top_n = body.get("top_n")
    return {"results": results[: top_n if isinstance(top_n, int) and top_n > 0 else None]}


def _listed(kind: str, field: str, values: list[Any]) -> dict[str, Any]:
    data = [{"index": index, "object": kind, field: value} for index, value in enumerate(values)]
    return {"object": "list", "data": data}


def _score(prompt: TokenArray, seed: int = 0) -> float:
    """In [0, 1)."""
    return xxhash.xxh3_64_intdigest(prompt.tobytes(), seed) / 2.0**64


def embedding(prompt: TokenArray, as_base64: bool) -> list[float] | str:
    """A unit vector that depends on every token, shape (EMBEDDING_DIMENSIONS,)."""
    digest = b"".join(
        xxhash.xxh3_128_digest(prompt.tobytes(), seed) for seed in range(EMBEDDING_DIMENSIONS // 8)
    )
    vector = np.frombuffer(digest, dtype="<i2").astype(np.float32)
    vector /= np.linalg.norm(vector)
    return base64.b64encode(vector.tobytes()).decode() if as_base64 else vector.tolist()


POOLED: dict[str, Pooled] = {
    "/v1/embeddings": Pooled("embd-", _inputs, _embeddings),
    "/pooling": Pooled("pool-", _inputs, _pooled),
    "/classify": Pooled("classify-", _inputs, _classes),
    "/v1/classify": Pooled("classify-", _inputs, _classes),
    "/score": Pooled("score-", _scored, _scores),
    "/v1/score": Pooled("score-", _scored, _scores),
    "/rerank": Pooled("rerank-", _compared("query", "documents"), _ranks),
    "/v1/rerank": Pooled("rerank-", _compared("query", "documents"), _ranks),
    "/v2/rerank": Pooled("rerank-", _compared("query", "documents"), _ranks),
}
"""By path."""
