"""Values that cross module boundaries of the gateway. No behaviour beyond small derivations.

Rules:
    1. Frozen and slotted; a value that changes is somebody's private state, not a type here.
    2. Quantities end in their unit. Arrays say shape and dtype. Absence is None, never a sentinel.
    3. Columns over candidates are plain Python sequences, not arrays: over the usual handful of endpoints a
       list is several times quicker than numpy, and over a thousand no slower (docs/adr/0006).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any, Final, Protocol

from metadata_center.types import EndpointKey, value

NO_OWNER = "passed"
"""In place of a worker's name, for requests that are routed past us: nobody keeps books on them."""


class Rng(Protocol):
    """The only randomness a decision may use; `random.Random` satisfies it."""

    def random(self) -> float:
        """Uniform float in [0, 1)."""
        ...


class Operation(StrEnum):
    """What the request asks for; values are OpenTelemetry `gen_ai.operation.name`s where one exists."""

    CHAT = "chat"
    TEXT_COMPLETION = "text_completion"
    RESPONSES = "responses"
    MESSAGES = "messages"
    EMBEDDINGS = "embeddings"
    COUNT_TOKENS = "count_tokens"
    TOKENIZE = "tokenize"
    DETOKENIZE = "detokenize"
    RERANK = "rerank"
    SCORE = "score"
    CLASSIFY = "classify"
    POOLING = "pooling"
    TRANSCRIPTION = "transcription"
    TRANSLATION = "translation"


GENERATING: Final = frozenset(
    (Operation.CHAT, Operation.TEXT_COMPLETION, Operation.RESPONSES, Operation.MESSAGES)
)
"""Operations of one kind of model: it has all of them or none."""


class Rewritable(Protocol):
    """A body that is edited without having been decoded; see `extproc.request.multipart.Form`."""

    def rewritten(self, model: str | None, allowed: frozenset[str]) -> bytes | None:
        """The body to send instead, or None if it may go as it came."""
        ...


@value
class InferenceRequest:
    """One understood request body.

    Attributes:
        operation: Which API it came by.
        model: The client's name for the model, before any rewriting.
        stream: True if the client asked for server-sent events.
        prompt: Canonical prompt bytes: equal conversation prefixes give equal byte prefixes;
            media replaced by content hashes. Never logged.
        prompt_tokens: Exact count when the client sent token ids, else None.
        max_tokens: The client's output bound, or None.
        cache_salt: The engine's cache namespace asked for by the client, or None.
        body: The decoded JSON object, owned by this request; sanitising edits it. Empty for a form.
        is_multimodal: True if any part was image, audio or video.
        form: The body where it is `multipart/form-data`, else None.
        widths: (offset in `prompt`, bytes) where media count for so many bytes more than they have there.
        more_bytes: What the prompt counts for beyond the length of `prompt`: widths, and what was cut off.
        has_body: False if `body` was left where it was decoded, so that nothing can be rendered here.
    """

    operation: Operation
    model: str
    stream: bool
    prompt: bytes
    prompt_tokens: int | None
    max_tokens: int | None
    cache_salt: str | None
    body: dict[str, Any]
    is_multimodal: bool = False
    form: Rewritable | None = None
    widths: tuple[tuple[int, int], ...] = ()
    more_bytes: int = 0
    has_body: bool = True

    @property
    def prompt_bytes(self) -> int:
        """Bytes that the prompt counts for."""
        return len(self.prompt) + self.more_bytes


@dataclass(frozen=True, slots=True)
class Endpoint:
    """One engine replica as the configuration names it, address resolved.

    `key` is `ip:port` (IPv6 in brackets) and is the identity everywhere: load, cache, health, Envoy.
    """

    key: EndpointKey
    cluster: str
    weight: int = 1
    labels: Mapping[str, str] = field(default_factory=dict)
    metadata: Mapping[str, str] = field(default_factory=dict)
    draining: bool = False


@value
class Learned:
    """What `least_completion` has learned, as one decision takes it.

    Attributes:
        prefill_prices_s: In the order of `extproc.predicting.ttft.TtftPrices`.
        followers_per_s: Requests that come to one endpoint while a second of backlog is worked off.
        decode_tokens: Seconds of TTFT that a second of time per output token is worth.
        rate_per_s: Requests that come to one endpoint.
        row_prices_s: Prices of each row, where rows differ in more than their weight; else empty.
    """

    prefill_prices_s: tuple[float, ...]
    followers_per_s: float
    decode_tokens: float
    rate_per_s: float = 0.0
    row_prices_s: Sequence[tuple[float, ...]] = ()


@value
class Snapshot:
    """What one decision looks at: one row per candidate, all columns of length n.

    Attributes:
        keys: Candidate endpoints, distinct.
        requests: In-flight requests.
        prefill_tokens: Uncached prompt tokens charged but not yet known to be prefilled.
        context_tokens: Prompt tokens of all in-flight requests (KV in use).
        matched_blocks: Longest contiguous cached prefix, 0..num_blocks.
        num_blocks: Length of this request's prompt in the same unit: blocks of ours where routing history is
            the only view of the caches, tokens where engines announce them.
        weights: Relative capacity, > 0.
        prefilling: Requests not known to be prefilled. This and all that follows is for `least_completion`.
        cached_tokens: Prompt tokens believed cached.
        steps_s: Predicted time per output token.
        kv_tokens: Size of the KV cache; 0 where it is unknown.
        prompt_tokens: Length of this request's prompt.
        output_tokens: Usual length of an answer.
        learned: Prices and traffic; None where another policy chooses.
        held_s: Work of all requests that wait at this gateway for these endpoints, in seconds.
        ahead_s: Work of those that go before this one, at the endpoint each waits for; empty if nobody does.
        seats: Most sequences that the engine runs at once, see `extproc.choosing.seats`; 0 where it is
            unknown, empty if it is unknown everywhere.
        kv_used: Tokens of the KV cache that running requests hold, as the engine says; None where it does not
            say, empty if none does. Without it the books are taken, which count shared prompts several times.
        under_way_s: For how long the endpoint has been at the prefill at the head of its queue: since a
            prefill last ended there, or since the first was sent; 0 where none is. Empty if unknown.
        owed: What each row is owed in this turn, see `extproc.choosing.rotation`; for `round_robin` alone.
    """

    keys: tuple[EndpointKey, ...]
    requests: Sequence[int]
    prefill_tokens: Sequence[int]
    context_tokens: Sequence[int]
    matched_blocks: Sequence[int]
    num_blocks: int
    weights: Sequence[float]
    prefilling: Sequence[int] = ()
    cached_tokens: Sequence[int] = ()
    steps_s: Sequence[float] = ()
    kv_tokens: Sequence[int] = ()
    prompt_tokens: int = 0
    output_tokens: float = 0.0
    learned: Learned | None = None
    held_s: float = 0.0
    ahead_s: Sequence[float] = ()
    seats: Sequence[int] = ()
    kv_used: Sequence[int | None] = ()
    under_way_s: Sequence[float] = ()
    owed: Sequence[float] = ()


@value
class Choice:
    """The outcome of a policy over one `Snapshot`.

    Attributes:
        order: Row indices, best first: the chosen endpoint, then fallbacks. Never empty, distinct.
        scores: Higher is better, one per row; None for policies without scores.
        candidates: How many of the best rows the pick was made among.
    """

    order: tuple[int, ...]
    scores: Sequence[float] | None
    candidates: int
