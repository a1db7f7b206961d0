"""Rules of other gateways on live traffic, to be compared with the product's own policy.

Rules:
    1. The product's policy decides first, with all that explain shows; the rival then says which of the same
       endpoints the request goes to. It charges, falls back and ends as any other.
    2. A rival has a memory: one object per rule and set of endpoints, in whose order its rows never change. A
       changed set begins anew.
    3. It is notified of each request that it scheduled: sent, first token, usage and end, once each, in this
       order.
    4. What it knows of other gateways is what the shared load says; of evictions it learns nothing.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Sequence
from typing import Final

from extproc.choosing.rivals.registry import make
from extproc.choosing.snapshots import Load, Prompt
from extproc.choosing.stateful import FleetView, PolicyRequest, Sent, StatefulPolicy
from extproc.routing.engines import Engines
from extproc.values.choices import Rng
from extproc.values.endings import Ending
from metadata_center.types import EndpointKey, RequestId, value

MAX_POLICIES: Final = 64
"""Objects kept, the one longest unused goes first: a handful of models is compared at a time."""


@value
class Contender:
    """One request as a rival is asked about it.

    Attributes:
        arrived_s: When it came.
        blocks: Hashes of its prompt's blocks.
        prompt: Its length, and what is cached of it where.
        slo_ttft_s: The client's own limit, or None.
        slo_tpot_s: Likewise.
    """

    arrived_s: float
    blocks: Sequence[int]
    prompt: Prompt
    slo_ttft_s: float | None = None
    slo_tpot_s: float | None = None


@value
class Picked:
    """What a rival said.

    Attributes:
        row: Where the request goes.
        policy: The rule that said so.
        sent: What its notifications carry from now on.
    """

    row: int
    policy: StatefulPolicy
    sent: Sent


class Rivals:
    """All that are compared by one worker.

    Args:
        engines: What is known of each engine.
        since_s: When the prefill at the head of each endpoint's queue began, 0 where none did.
        processes: How many processes schedule requests on these endpoints, of all gateways.
    """

    def __init__(
        self,
        engines: Engines,
        since_s: Callable[[Sequence[EndpointKey]], Sequence[float]],
        processes: Callable[[], int],
    ) -> None:
        self._engines = engines
        self._since_s = since_s
        self._processes = processes
        self._policies: OrderedDict[tuple[str, tuple[EndpointKey, ...]], StatefulPolicy] = OrderedDict()
        self._placed: dict[RequestId, Picked] = {}
        self._asked = 0

    def __len__(self) -> int:
        """Requests that a rival scheduled and that have not ended."""
        return len(self._placed)

    def choose(
        self,
        rule: str,
        contender: Contender,
        keys: tuple[EndpointKey, ...],
        weights: Sequence[float],
        groups: Sequence[str],
        load: Load,
        rng: Rng,
        now_s: float,
    ) -> Picked | None:
        """Ask a rival.

        Args:
            rule: As `extproc.choosing.rivals.registry.make` takes it; it was checked before.
            contender: The request.
            keys: Endpoints, at least one.
            weights: One per key.
            groups: One for all, or one per key.
            load: One row per key.
            rng: Source of its draws.
            now_s: Monotonic time.

        Returns:
            None if it would hold or refuse the request: the product's own choice stands.
        """
        policy = self._policy(rule, keys)
        view = self._view(contender, keys, weights, groups, load, rng, now_s)
        row = policy.choose(view)
        if not isinstance(row, int):
            return None
        return Picked(row, policy, Sent(view.request, row, now_s, view.matched_tokens()[row]))

    def sent(self, request_id: RequestId, picked: Picked) -> None:
        """The request was charged and is on its way."""
        self._placed[request_id] = picked
        picked.policy.on_sent(picked.sent)

    def first_token(self, request_id: RequestId, now_s: float) -> None:
        """Its first token passes now; called once."""
        picked = self._placed.get(request_id)
        if picked is not None:
            picked.policy.on_first_token(picked.sent, now_s)

    def ended(self, ending: Ending) -> None:
        """It is over, see `extproc.values.endings.EndingListener`."""
        picked = self._placed.pop(ending.record.request_id, None)
        if picked is None:
            return
        outcome = ending.outcome
        if ending.is_answered and outcome.prompt_tokens is not None:
            picked.policy.on_usage(picked.sent, outcome.prompt_tokens, outcome.cached_tokens or 0)
        output_tokens = (outcome.completion_tokens or 1) if ending.is_answered else 0
        picked.policy.on_finished(picked.sent, ending.now_s, output_tokens)

    def _policy(self, rule: str, keys: tuple[EndpointKey, ...]) -> StatefulPolicy:
        policy = self._policies.get((rule, keys))
        if policy is None:
            if len(self._policies) >= MAX_POLICIES:
                self._policies.popitem(last=False)
            policy = self._policies[rule, keys] = make(rule)
        else:
            self._policies.move_to_end((rule, keys))
        return policy

    def _view(
        self,
        contender: Contender,
        keys: tuple[EndpointKey, ...],
        weights: Sequence[float],
        groups: Sequence[str],
        load: Load,
        rng: Rng,
        now_s: float,
    ) -> FleetView:
        engines, prompt, blocks = self._engines, contender.prompt, contender.blocks
        readings = list(map(engines.reading, keys))
        sizes = engines.kv_tokens
        self._asked += 1
        units = max(1, prompt.num_units)
        return FleetView(
            now_s=now_s,
            rng=rng,
            request=PolicyRequest(
                self._asked,
                contender.arrived_s,
                prompt.tokens,
                blocks,
                slo_ttft_s=contender.slo_ttft_s,
                slo_tpot_s=contender.slo_tpot_s,
            ),
            gateways=self._processes(),
            block_size=max(1, prompt.tokens // max(1, len(blocks))),
            keys=keys,
            groups=groups if len(groups) == len(keys) else [groups[0]] * len(keys),
            weights=weights,
            kv_tokens=[sizes.get(key, 0) for key in keys],
            requests=load.requests,
            prefilling=load.prefilling,
            prefill_tokens=load.prefill_tokens,
            prompt_tokens=[
                max(pending, context * prefilling // requests) if requests else pending
                for pending, context, prefilling, requests in zip(
                    load.prefill_tokens, load.context_tokens, load.prefilling, load.requests, strict=True
                )
            ],
            context_tokens=load.context_tokens,
            waiting=[reading.waiting for reading in readings],
            running=[reading.running for reading in readings],
            kv_usage=[reading.kv_usage_ratio for reading in readings],
            scraped_s=[float(reading.number) for reading in readings],
            matched_blocks=[matched * len(blocks) // units for matched in prompt.matched],
            since_s=[since or now_s for since in self._since_s(keys)],
        )
