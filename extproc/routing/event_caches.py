"""Prompts held against what engines announced to have cached.

Rules:
    1. An endpoint announces while none of its publishers is behind and its engine was seen to render and
       tokenize as the model's files say. The follower of events says so here; a decision only looks.
    2. One text per request serves all endpoints, so a model's rendering is used as far as every endpoint of
       it that announces agrees with it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Final

from extproc.rendering.prompt_text import Rendering
from extproc.routing.caches import EventMatch
from extproc.values.requests import InferenceRequest
from metadata_center.cache_map.cache_map import CacheMap
from metadata_center.roots import root
from metadata_center.types import EndpointKey

_MAX_GROUPS: Final = 256  # keys tuples remembered: far more than a gateway has models


@dataclass(frozen=True, slots=True)
class ModelText:
    """How the prompts of one model become text.

    Attributes:
        space: Name of its tokenizer: models of one space share what engines announce.
        rendering: As far as it may be relied on.
    """

    space: str
    rendering: Rendering


class EventCaches:
    """What engines' KV events say is cached, as `Caches` asks for them.

    Args:
        caches: What they announced.
        wall_clock: Unix seconds, for chat templates that print the date.
    """

    def __init__(self, caches: CacheMap, wall_clock: Callable[[], float]) -> None:
        self._caches = caches
        self._wall_clock = wall_clock
        self._models: dict[str, ModelText] = {}
        self._announcing: frozenset[EndpointKey] = frozenset()
        self._incomplete: frozenset[EndpointKey] = frozenset()
        self._groups: dict[int, tuple[tuple[EndpointKey, ...], tuple[int, ...]]] = {}

    def set_models(self, models: Mapping[str, ModelText]) -> None:
        """Replace what is known of models; others are left to history."""
        self._models = dict(models)

    def set_announcing(
        self, endpoints: Iterable[EndpointKey], incomplete: Iterable[EndpointKey] = ()
    ) -> None:
        """Replace the endpoints that announce; of `incomplete` ones, what they cached before is unknown."""
        self._incomplete = frozenset(incomplete)
        self._announcing = frozenset(endpoints) | self._incomplete
        self._groups.clear()

    def is_announcing(self, endpoint: EndpointKey) -> bool:
        """True if the endpoint speaks for itself."""
        return endpoint in self._announcing

    def match(
        self,
        request: InferenceRequest,
        model: str,
        lora: str | None,
        keys: tuple[EndpointKey, ...],
        tokens_per_byte: float,
    ) -> EventMatch | None:
        """See `EventView`."""
        known = self._models.get(model)
        if known is None:
            return None
        _, rows = self._groups.get(id(keys)) or self._group(keys)
        if not rows:
            return None
        text = known.rendering.prompt_text(request, self._wall_clock())
        if text is None:
            return None
        found = self._caches.match(root(known.space, lora, request.cache_salt), text.text, keys, text.verify)
        tokens: list[int | None] = [None] * len(keys)
        worth = [0.0] * len(keys)
        block_tokens = [0] * len(keys)
        is_complete = [True] * len(keys)
        for row in rows:
            is_complete[row] = keys[row] not in self._incomplete
            tokens[row] = found.tokens[row]
            worth[row] = found.worth_tokens[row]
            block_tokens[row] = found.block_sizes[row]
        prompt_tokens = text.num_tokens
        if prompt_tokens is None:  # what engines hold is counted, the rest has its share of the estimate
            rest = (len(text.text) - found.counted_bytes) / max(1, len(text.text))
            rest_tokens = round(rest * request.prompt_bytes * tokens_per_byte)
            prompt_tokens = max(found.counted_tokens + rest_tokens, 1 + max(found.tokens))
        return EventMatch(tokens, worth, is_complete, block_tokens, prompt_tokens)

    def _group(self, keys: tuple[EndpointKey, ...]) -> tuple[tuple[EndpointKey, ...], tuple[int, ...]]:
        if len(self._groups) >= _MAX_GROUPS:
            self._groups.clear()
        rows = tuple(row for row, key in enumerate(keys) if key in self._announcing)
        group = self._groups[id(keys)] = (keys, rows)  # the keys are held, so that their id stays their own
        return group
