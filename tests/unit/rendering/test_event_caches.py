"""Prompts held against what engines announced: which are asked, and how exactly they answer."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import orjson

from extproc.rendering.loading import load
from extproc.rendering.prompt_text import Feature, Rendering
from extproc.request.parse import parse
from extproc.routing.caches import EventMatch
from extproc.routing.event_caches import EventCaches, ModelText
from extproc.values.requests import InferenceRequest
from metadata_center.cache_map.cache_map import CacheMap
from metadata_center.kv_events.events import Batch, BlockStored, encoded_token_ids
from metadata_center.types import EndpointKey

DATA = Path(__file__).parents[2] / "data" / "rendering"
KEYS = tuple(EndpointKey(f"10.0.0.{number}:8000") for number in range(3))
BLOCK_TOKENS = 4
SPACE = "chatml"
NOW_UNIX_S = 1_782_777_600.0
TEXT = "the index of every block of every prompt is the text of its tokens, and so it goes on and on"


@cache
def rendering() -> Rendering:
    """A small byte-level tokenizer with a chat template."""
    return load(DATA / SPACE)


def completion(text: str = TEXT, **fields: Any) -> InferenceRequest:
    """A request for a completion."""
    return parse("/v1/completions", orjson.dumps({"model": "m", "prompt": text, **fields}))


def _text_of(tokens: int) -> bytes:
    """What the first tokens of `TEXT` say."""
    text = rendering().vocabulary.text_of(rendering().encoder.encode(TEXT)[:tokens])
    assert text is not None
    return text


class Fleet:
    """Engines that have computed prompts, and what a gateway makes of it."""

    def __init__(self, *, follows: tuple[EndpointKey, ...] = KEYS[:2]) -> None:
        self.caches = CacheMap()
        self.event_caches = EventCaches(self.caches, lambda: NOW_UNIX_S)
        self.event_caches.set_models({"m": ModelText(SPACE, rendering())})
        self.event_caches.set_announcing(follows)
        self.replicas = {
            key: self.caches.attach(key, 0, SPACE, rendering().vocabulary.pieces) for key in KEYS
        }

    def compute(
        self, key: EndpointKey, text: str, *, lora: str | None = None, salt: str | None = None
    ) -> int:
        """An engine computes a prompt and announces it; returns its tokens."""
        ids = rendering().encoder.encode(text)
        blocks = len(ids) // BLOCK_TOKENS
        extra: list[list[Any] | None] = [[lora] if lora else None for _ in range(blocks)]
        if salt:
            extra[0] = [*(extra[0] or ()), salt]
        stored = BlockStored(
            hashes=[
                hash((tuple(ids[: (i + 1) * BLOCK_TOKENS]), lora, salt)) & (2**63 - 1) for i in range(blocks)
            ],
            parent=None,
            raw_token_ids=encoded_token_ids(ids[: blocks * BLOCK_TOKENS]),
            block_size=BLOCK_TOKENS,
            medium="GPU",
            lora_name=lora,
            lora_id=1 if lora else None,
            extra_keys=extra,
        )
        self.caches.apply(self.replicas[key], Batch(0.0, [stored], 0))
        return len(ids)

    def match(
        self, request: InferenceRequest | None = None, model: str = "m", lora: str | None = None
    ) -> EventMatch | None:
        """What the engines have of a request's prompt."""
        return self.event_caches.match(request or completion(), model, lora, KEYS, 0.25)


def found(by_events: EventMatch | None) -> list[int | None]:
    """Usable cached tokens per endpoint."""
    assert by_events is not None
    return list(by_events.tokens)


def test_the_hit_is_what_the_engine_would_use() -> None:
    """Whole blocks, one token short of the prompt at most; one that does not announce has no answer."""
    fleet = Fleet()
    tokens = fleet.compute(KEYS[0], TEXT)
    assert found(fleet.match()) == [(tokens - 1) // BLOCK_TOKENS * BLOCK_TOKENS, 0, None]


def test_a_start_that_is_shared_counts_to_its_last_whole_block() -> None:
    """Another prompt with the same beginning."""
    fleet = Fleet()
    fleet.compute(KEYS[1], TEXT + " and this is another end of it")
    by_events = fleet.match(completion(TEXT + " but this one differs"))
    shared = len(rendering().encoder.encode(TEXT))
    assert found(by_events) == [0, shared // BLOCK_TOKENS * BLOCK_TOKENS, None]
    assert by_events is not None
    assert list(by_events.block_tokens) == [0, BLOCK_TOKENS, 0]
    rest_bytes = (
        len(" but this one differs") + len(TEXT) - len(_text_of(shared // BLOCK_TOKENS * BLOCK_TOKENS))
    )
    assert by_events.prompt_tokens == shared // BLOCK_TOKENS * BLOCK_TOKENS + round(rest_bytes * 0.25)


def test_salts_and_adapters_are_caches_of_their_own() -> None:
    """A hit needs the same adapter and the same salt."""
    fleet = Fleet()
    fleet.compute(KEYS[0], TEXT, lora="ad1")
    fleet.compute(KEYS[1], TEXT, salt="s")
    assert found(fleet.match()) == [0, 0, None]
    hit = found(fleet.match(lora="ad1"))[0]
    assert hit
    assert found(fleet.match(completion(cache_salt="s"))) == [0, hit, None]
    assert found(fleet.match(completion(cache_salt="t"), lora="ad1")) == [0, 0, None]


def test_token_ids_are_counted_exactly() -> None:
    """A prompt of ids has the length that it has, whatever bytes say."""
    fleet = Fleet()
    ids = rendering().encoder.encode(TEXT)
    fleet.compute(KEYS[0], TEXT)
    request = parse("/v1/completions", orjson.dumps({"model": "m", "prompt": ids}))
    by_events = fleet.match(request)
    assert by_events is not None
    assert by_events.prompt_tokens == len(ids)
    assert found(by_events)[0] == (len(ids) - 1) // BLOCK_TOKENS * BLOCK_TOKENS


def test_what_is_not_known_exactly_is_left_to_history() -> None:
    """Another model, a pool where none announces, an API or a feature that the rendering does not cover."""
    fleet = Fleet()
    fleet.compute(KEYS[0], TEXT)
    assert fleet.match(model="other") is None
    chat = parse(
        "/v1/chat/completions", orjson.dumps({"model": "m", "messages": [{"role": "user", "content": "x"}]})
    )
    assert fleet.match(chat) is not None
    only = rendering().restricted(frozenset({Feature.COMPLETION}), tokens_agree=True)
    fleet.event_caches.set_models({"m": ModelText(SPACE, only)})
    assert fleet.match(chat) is None
    assert fleet.match() is not None
    fleet.event_caches.set_announcing(())
    assert fleet.match() is None
    assert not fleet.event_caches.is_announcing(KEYS[0])


def test_what_announces_may_change_between_two_requests() -> None:
    """The same pool is asked anew when an engine falls silent or begins to speak."""
    fleet = Fleet(follows=(KEYS[0],))
    for key in KEYS:
        fleet.compute(key, TEXT)
    hit = found(fleet.match())[0]
    assert found(fleet.match()) == [hit, None, None]
    fleet.event_caches.set_announcing(KEYS[1:])
    assert found(fleet.match()) == [None, hit, hit]
    fleet.event_caches.set_announcing(KEYS[1:2], incomplete=KEYS[2:])
    by_events = fleet.match()
    assert found(by_events) == [None, hit, hit]
    assert by_events is not None
    assert list(by_events.is_complete) == [True, True, False]
