"""A policy with a memory of its own: what it may see, what it may answer, what it learns afterwards.

Rules:
    1. A view holds what a router in production could know at that moment, and no more: its own ledger, what
       other gateways pushed, metrics as old as their last scrape, and a guess of each cache.
    2. One column per fact, one row per endpoint, rows in the same order from one call to the next. The
       columns belong to the caller: a policy keeps no reference to them and changes none.
    3. A policy object serves one gateway. It is notified of each request that this gateway sent, in the order
       of time, and of nothing that others did.
    4. Time and randomness come with the call: equal histories and equal draws give equal choices.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from extproc.values.choices import Rng
from metadata_center.types import EndpointKey, Waiter, value


@value
class PolicyRequest:
    """One request as the gateway knows it before it is sent.

    Attributes:
        request_id: Distinct among all requests of a run.
        arrived_s: When it came to the gateway, before any holding.
        prompt_tokens: Length of the prompt, >= 1; an estimate unless the run says otherwise.
        blocks: Chained keys of the prompt's full blocks, head first: equal keys mean equal prefixes.
        session: Name of the conversation, or None.
        slo_ttft_s: Limit on the time to first token that the client asked for, or None.
        slo_tpot_s: Limit on the time per output token that the client asked for, or None.
    """

    request_id: int
    arrived_s: float
    prompt_tokens: int
    blocks: Sequence[int]
    session: str | None = None
    slo_ttft_s: float | None = None
    slo_tpot_s: float | None = None


@value
class FleetView:
    """What one decision looks at.

    The columns named "ledger" are sums over requests that were sent and have not ended, as this gateway
    knows them: its own at once, others' once they were pushed.

    Attributes:
        now_s: The time.
        rng: The source of draws.
        request: What to place.
        gateways: How many gateways route to these endpoints, this one included, >= 1.
        block_size: Tokens per block of `PolicyRequest.blocks`.
        keys: The endpoints, distinct; the same tuple object as long as they stay the same.
        groups: Name of the hardware and model each endpoint runs on: equal names, equal speed.
        weights: Relative capacity, > 0.
        kv_tokens: KV cache capacity in tokens.
        requests: Ledger: requests.
        prefilling: Ledger: requests whose first token is not known to have come.
        prefill_tokens: Ledger: uncached prompt tokens, as estimated when sent, of the `prefilling`.
        prompt_tokens: Ledger: prompt tokens, cached ones included, of the `prefilling`.
        context_tokens: Ledger: prompt tokens of all requests.
        waiting: Scraped: requests in the engine's queue.
        running: Scraped: requests in the engine's batch.
        kv_usage: Scraped: share of the KV cache held by running requests, 0..1.
        scraped_s: When the scraped columns were read; the same time as before means the same values.
        matched_blocks: Leading blocks of the prompt that the endpoint holds by the cache view in use.
        computed_tokens: Scraped: prompt tokens of all requests whose prompt is computed; empty if that is not
            known.
        since_s: Ledger: when a prefill last ended there, or the first of the `prefilling` was sent, whichever
            was later; empty if that was not noted.
    """

    now_s: float
    rng: Rng
    request: PolicyRequest
    gateways: int
    block_size: int
    keys: tuple[EndpointKey, ...]
    groups: Sequence[str]
    weights: Sequence[float]
    kv_tokens: Sequence[int]
    requests: Sequence[int]
    prefilling: Sequence[int]
    prefill_tokens: Sequence[int]
    prompt_tokens: Sequence[int]
    context_tokens: Sequence[int]
    waiting: Sequence[int]
    running: Sequence[int]
    kv_usage: Sequence[float]
    scraped_s: Sequence[float]
    matched_blocks: Sequence[int]
    since_s: Sequence[float] = ()
    computed_tokens: Sequence[float] = ()

    def matched_tokens(self) -> list[int]:
        """Cached prompt tokens per row: whole blocks, and never the last token, which is always computed."""
        most = self.request.prompt_tokens - 1
        return [min(matched * self.block_size, most) for matched in self.matched_blocks]

    def uncached_tokens(self) -> list[int]:
        """Prompt tokens that each row would have to compute, >= 1."""
        prompt_tokens, block_size = self.request.prompt_tokens, self.block_size
        return [max(prompt_tokens - matched * block_size, 1) for matched in self.matched_blocks]


@dataclass(frozen=True, slots=True)
class Hold:
    """Do not send the request yet.

    It is asked for again, in a fresh view, after each first token, end or refusal that this gateway learns
    of, and at `until_s` at the latest. Held requests are asked for in the order of `rank`, then of arrival.

    Attributes:
        until_s: Later than now.
        rank: Lower is asked for first.
        closed: Nothing of a higher rank could be sent either: the others are not asked for this time.
        polls: Time alone may free what it waits for: all held requests are asked for every so often, too.
    """

    until_s: float
    rank: float = 0.0
    closed: bool = False
    polls: bool = False


@dataclass(frozen=True, slots=True)
class Shed:
    """Refuse the request with status 429.

    Attributes:
        retry_after_s: Value of the client's `retry-after`, > 0.
    """

    retry_after_s: float


Decision = int | Hold | Shed
"""The row to send the request to, or why it is not sent now."""


@value
class Sent:
    """One request on its way, the same object in every call about it.

    Attributes:
        request: Which.
        row: The endpoint it was sent to.
        sent_s: When.
        matched_tokens: What was expected to be cached there.
    """

    request: PolicyRequest
    row: int
    sent_s: float
    matched_tokens: int


class StatefulPolicy:
    """A routing rule; the observers do nothing unless a rule overrides them.

    The parameters of a rule are the keyword arguments of its `__init__`, all with defaults.
    """

    __slots__ = ()

    def choose(self, view: FleetView) -> Decision:
        """Decide where `view.request` goes. It may come again if it was held, and be abandoned while held."""
        raise NotImplementedError

    def on_sent(self, sent: Sent) -> None:
        """`choose` returned a row and the request is on its way; called before any other decision."""

    def on_first_token(self, sent: Sent, now_s: float) -> None:
        """The first token passed the gateway; not called in a run where gateways cannot see it."""

    def on_usage(self, sent: Sent, prompt_tokens: int, cached_tokens: int) -> None:
        """What the engine counted of the prompt and had cached of it; before `on_finished`, if it says so."""

    def on_finished(self, sent: Sent, now_s: float, output_tokens: int) -> None:
        """The request ended and the gateway knows; 0 output tokens if it was refused or aborted."""

    def on_left(self, request: PolicyRequest) -> None:
        """Its client left while it was held: it does not come again."""

    def on_evicted(self, row: int, blocks: Sequence[int]) -> None:
        """An engine's announcement that it dropped `blocks` arrived; not called in a run without events."""

    def line(self) -> Sequence[Waiter]:
        """Who is held here, as other gateways are to know it, first in line first."""
        return ()

    def on_line(self, gateway: str, line: Sequence[Waiter], now_s: float) -> None:
        """Who is held at another gateway now, ranks on this one's clock."""
