"""Asks a running engine whether it renders and tokenizes as a `Rendering` of its model says.

Rules:
    1. Loaders replace parts of tokenizer files, engines have renderers of their own, and neither says so:
       a rendering is relied on for what an engine was seen to agree with, and for nothing else.
    2. One POST to `/tokenize` per sample, each within the time-out. Whatever goes wrong is a reason, never
       an exception; what did not answer at all is not asked again.
    3. The samples are ours, so reasons may quote positions in them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from http import HTTPStatus
from typing import Any, Final

import aiohttp
import orjson

from extproc.rendering.prompt_text import Feature, PromptText, Rendering
from extproc.request.parse import parse

_MAX_ANSWER_BYTES: Final = 256 * 1024
"""Of one answer; the longest sample is some hundred tokens."""

_TOOLS: Final[list[dict[str, Any]]] = [
    {
        "type": "function",
        "function": {
            "name": "look_up",
            "description": "Looks <up> a \"term\" in 'the' index & says où.",
            "parameters": {
                "type": "object",
                "properties": {"term": {"type": "string"}, "limit": {"type": "integer", "default": 3}},
                "required": ["term"],
            },
        },
    },
    {"type": "function", "function": {"name": "now", "parameters": {"type": "object", "properties": {}}}},
]

_CALL: Final[dict[str, Any]] = {
    "id": "call00001",
    "type": "function",
    "function": {"name": "look_up", "arguments": '{"term": "prefix <cache>", "limit": 2}'},
}

_COMPLETIONS: Final = (
    "def walk(tree):\n    for leaf in tree:\n\n        yield  leaf  # don't\r\n\tpass\n",
    " leading, trailing and  double spaces; DON'T we'LL {\"a\":[1,-2.50]};\n\n\n   \t ",
    "na\u00efve e\u0301 \u212b, 日本語の文。中文，标点！ Привет "
    "\U0001f600\u200d\U0001f4bb\u00a01234567 x\u2009y",
)

_CHATS: Final[tuple[dict[str, Any], ...]] = (
    {"messages": [{"role": "user", "content": "Hello, who are you?"}]},
    {
        "messages": [
            {"role": "system", "content": "Be brief.\n"},
            {"role": "user", "content": "  What's a KV cache?  "},
            {"role": "assistant", "content": "A memory of keys\nand values."},
            {
                "role": "user",
                "content": [{"type": "text", "text": "And "}, {"type": "text", "text": "日本?"}],
            },
        ]
    },
    {
        "messages": [
            {"role": "user", "content": "1 + 1?"},
            {"role": "assistant", "content": "2", "reasoning": "Add them.\n"},
            {"role": "user", "content": "Sure? \u00e9 e\u0301"},
        ]
    },
)

_TOOL_CHATS: Final[tuple[dict[str, Any], ...]] = (
    {"messages": [{"role": "user", "content": "What time is it?"}], "tools": _TOOLS},
    {
        "messages": [
            {"role": "system", "content": "Be brief."},
            {"role": "user", "content": "Look up prefix cache."},
            {"role": "assistant", "content": None, "tool_calls": [_CALL]},
            {"role": "tool", "tool_call_id": "call00001", "content": '{"hits": 2, "text": "où <b>"}'},
            {"role": "assistant", "content": "Two hits."},
            {"role": "user", "content": "Thanks!"},
        ],
        "tools": _TOOLS[:1],
    },
)

SAMPLES: Final[Mapping[Feature, tuple[dict[str, Any], ...]]] = {
    Feature.COMPLETION: tuple({"prompt": prompt} for prompt in _COMPLETIONS),
    Feature.CHAT: _CHATS,
    Feature.TOOLS: _TOOL_CHATS,
}
"""Bodies without `model` that are both requests and questions to `/tokenize`, by what they try."""


@dataclass(frozen=True, slots=True)
class CheckedRendering:
    """What an engine was seen to agree with.

    Attributes:
        rendering: What may be relied on with this engine: the rendering that was asked about, or one of
            its alternatives, restricted. Of no features if the engine agrees with nothing.
        reasons: What spoke against the missing features, and against the token boundaries.
    """

    rendering: Rendering
    reasons: tuple[str, ...]

    @property
    def ok(self) -> bool:
        """True if the rendering is of any use for this engine."""
        return bool(self.rendering.features)


async def check_engine(
    session: aiohttp.ClientSession,
    base_url: str,
    model: str,
    rendering: Rendering,
    now_unix_s: float,
    timeout_s: float = 10.0,
    tls: Mapping[str, Any] | None = None,
) -> CheckedRendering:
    """Try the samples on one engine: eight small requests, one after the other.

    For several replicas, ask the next one about the verdict's rendering: restrictions add up.

    Args:
        session: Carries what the engine wants for authorization.
        base_url: `http://ip:port` of the engine.
        model: The name that the engine serves the model under.
        rendering: Of the model's files.
        now_unix_s: The time, for templates that print the date.
        timeout_s: Per request.
        tls: Given to aiohttp with each request if the engine speaks TLS.
    """
    answers: list[tuple[Feature, int, dict[str, Any], list[int] | None]] = []
    try:
        for feature in Feature:
            for number, body in enumerate(SAMPLES[feature]):
                named = {**body, "model": model}
                theirs = await _theirs(session, base_url, named, timeout_s, tls or {})
                answers.append((feature, number, named, theirs))
    except _NoAnswerError as silence:
        return CheckedRendering(rendering.restricted(frozenset(), tokens_agree=False), (str(silence),))
    verdicts = [_judge(one, answers, now_unix_s) for one in (rendering, *rendering.alternatives)]
    return max(
        verdicts, key=lambda verdict: (len(verdict.rendering.features), verdict.rendering.tokens_agree)
    )


def _judge(
    rendering: Rendering,
    answers: list[tuple[Feature, int, dict[str, Any], list[int] | None]],
    now_unix_s: float,
) -> CheckedRendering:
    """Compare what the engine answered with what a rendering says of the same samples."""
    whole = replace(rendering, features=frozenset(Feature), tokens_agree=True)
    agreed: set[Feature] = set()
    failed: set[Feature] = set()
    tokens_agree = True
    reasons: list[str] = []
    for feature, number, body, theirs in answers:
        ours = _ours(whole, feature, body, now_unix_s)
        if ours is None and theirs is None:
            continue  # refused by both: says nothing about the others
        reason = _text_reason(whole, ours, theirs)
        if reason is not None:
            failed.add(feature)
            reasons.append(f"{feature} sample {number}: {reason}")
            continue
        agreed.add(feature)
        if ours is not None and _tokens(ours) != theirs:
            tokens_agree = False
            reasons.append(f"{feature} sample {number}: the text is cut into other tokens")
    reasons += [
        f"{feature}: both refuse all samples" for feature in Feature if feature not in agreed | failed
    ]
    restricted = rendering.restricted(frozenset(agreed - failed), tokens_agree=tokens_agree)
    return CheckedRendering(restricted, tuple(reasons))


class _NoAnswerError(Exception):
    """The engine cannot be asked; the message says why."""


def _ours(
    rendering: Rendering, feature: Feature, body: dict[str, Any], now_unix_s: float
) -> PromptText | None:
    path = "/v1/completions" if feature is Feature.COMPLETION else "/v1/chat/completions"
    return rendering.prompt_text(parse(path, orjson.dumps(body)), now_unix_s)


def _tokens(prompt: PromptText) -> list[int] | None:
    found = prompt.verify.tokens_between(0, len(prompt.text)) if prompt.verify is not None else None
    return None if found is None else list(found)


async def _theirs(
    session: aiohttp.ClientSession,
    base_url: str,
    body: Mapping[str, Any],
    timeout_s: float,
    tls: Mapping[str, Any],
) -> list[int] | None:
    """Token ids by the engine; None if it refuses the request."""
    try:
        async with session.post(
            f"{base_url}/tokenize",
            data=orjson.dumps(body),
            headers={"content-type": "application/json"},
            timeout=aiohttp.ClientTimeout(total=timeout_s),
            **tls,
        ) as response:
            if response.status in (HTTPStatus.BAD_REQUEST, HTTPStatus.UNPROCESSABLE_ENTITY):
                return None
            if response.status != HTTPStatus.OK:
                raise _NoAnswerError(f"/tokenize answers {response.status}")
            answer = await response.content.read(_MAX_ANSWER_BYTES)
            while not response.content.at_eof() and len(answer) < _MAX_ANSWER_BYTES:
                answer += await response.content.read(_MAX_ANSWER_BYTES - len(answer))
    except (TimeoutError, aiohttp.ClientError, OSError) as error:
        raise _NoAnswerError(f"/tokenize: {type(error).__name__}") from error
    try:
        ids = orjson.loads(answer)["tokens"]
    except (orjson.JSONDecodeError, KeyError, TypeError):
        raise _NoAnswerError("/tokenize answers without tokens") from None
    if type(ids) is not list or not all(type(token_id) is int for token_id in ids):
        raise _NoAnswerError("/tokenize answers without tokens")
    return ids


def _text_reason(rendering: Rendering, ours: PromptText | None, theirs: list[int] | None) -> str | None:
    """Why the texts differ; None if they are equal."""
    if theirs is None:
        return "the engine refuses it"
    if ours is None:
        return "we refuse it, the engine does not"
    text = rendering.vocabulary.text_of(theirs)
    if text is None:
        return "the engine has token ids that tokenizer.json has not"
    if text == ours.text:
        return None
    pairs = zip(text, ours.text, strict=False)
    at = next((index for index, (a, b) in enumerate(pairs) if a != b), min(len(text), len(ours.text)))
    return f"the text differs from byte {at} on"
