"""What other gateways have in flight, as this one's counters are to show it.

Rules:
    1. What others count at an endpoint is the sum of their members' shares (as old as their last messages),
       and the optimistic increment.
    2. Optimistic increment: other gateways place requests in the same moment by the same view and thus on
       the same endpoints. Until the own message that carries a charge comes back, by when everything
       accepted before it was heard, the charge counts once per live gateway (vLLM's data-parallel
       coordinator scales by its API servers in the same way). At most `OPTIMISM_S`: by then the moment is
       over, and what others chose in it is theirs to tell, however long that takes.
    3. A share that has fewer prefills than before says that one ended, and one that has more where there was
       none that one began: the prefill at the head of the endpoint's queue is under way from when that was
       heard.
"""

from __future__ import annotations

from collections import deque
from typing import Final

from metadata_center.load.counters import Counters
from metadata_center.load.kinds import PREFILL_REQUESTS, Amounts, difference, each, least, of_charge, sum_of
from metadata_center.sharing.messages import Update
from metadata_center.sharing.peers import Peers
from metadata_center.types import Charge, EndpointKey

OPTIMISM_S: Final = 0.05
"""A burst is some milliseconds long, and so are the way of a message and the pause between two (16 ms among
64 members). Longer, up to a slow store's echo (200 ms), it would count requests that have ended: gateways
then keep away from the endpoints that they use, and with that from the caches which they have filled."""

MAX_UNHEARD: Final = 65_536
"""Charges with an optimistic increment: 1.3 million a second for `OPTIMISM_S`. Further ones get none."""

MAX_OTHERS_REQUESTS: Final = 1 << 24
"""Of all other gateways, at one endpoint: what 64 of them hold in all at their default bound. More is not
believed: a thousand members of which each may say 2**53 - 1 would not fit into the counters."""

MAX_OTHERS_TOKENS: Final = 1 << 44
"""As many requests of a million tokens."""

_MOST: Final = each(requests=MAX_OTHERS_REQUESTS, tokens=MAX_OTHERS_TOKENS)


class Others:
    """Other gateways' load, kept in the counters of this one.

    Args:
        own_gateway: Its members are not others.
        counters: Where it is shown.
        optimistic: Rule 2; pointless where every charge is put to the rendezvous.
    """

    def __init__(self, own_gateway: str, counters: Counters, *, optimistic: bool) -> None:
        self.peers = Peers(own_gateway)
        self._counters = counters
        self._optimistic = optimistic
        self._sequence = 0
        self._prefills: dict[EndpointKey, int] = {}
        self._ahead: dict[EndpointKey, Amounts] = {}
        self._unheard: deque[tuple[int, float, EndpointKey, Amounts]] = deque()

    def apply(self, update: Update, now_s: float) -> None:
        """A member said something."""
        for key in self.peers.apply(update, now_s):
            self._note_prefills(key, now_s)
            self._show(key)

    def charged(self, charge: Charge, now_s: float) -> None:
        """This gateway charged a request; no other gateway knows it yet."""
        gateways = self.peers.live_gateways
        if not gateways or not self._optimistic or len(self._unheard) >= MAX_UNHEARD:
            return
        key = charge.endpoint
        amounts = of_charge(charge.prefill_tokens, charge.context_tokens, times=gateways)
        self._unheard.append((self._sequence + 1, now_s + OPTIMISM_S, key, amounts))
        ahead = self._ahead.get(key)
        self._ahead[key] = amounts if ahead is None else sum_of(ahead, amounts)
        self._show(key)

    def said(self, sequence: int) -> None:
        """An own message was made; what was charged before is in it."""
        self._sequence = sequence

    def heard(self, sequence: int) -> None:
        """An own message came back."""
        while self._unheard and self._unheard[0][0] <= sequence:
            self._forget()

    def advance(self, now_s: float) -> None:
        """End shares and increments that are over by `now_s`; O(1) when none is."""
        for key in self.peers.advance(now_s):
            self._note_prefills(key, now_s)
            self._show(key)
        while self._unheard and self._unheard[0][1] <= now_s:
            self._forget()

    def amounts(self, key: EndpointKey) -> Amounts:
        """What others count at an endpoint."""
        shares = self.peers.total(key)
        ahead = self._ahead.get(key)
        amounts = shares if ahead is None else sum_of(shares, ahead)
        # Nearly always: one look at the largest costs a fifth of five comparisons.
        return amounts if max(amounts) <= MAX_OTHERS_REQUESTS else least(_MOST, amounts)

    def _note_prefills(self, key: EndpointKey, now_s: float) -> None:
        before, now = self._prefills.get(key, 0), self.peers.total(key)[PREFILL_REQUESTS]
        if now < before or (now > before and not self._counters.prefilling(key)):
            self._counters.prefill_turned(key, now_s)
        if now:
            self._prefills[key] = now
        else:
            self._prefills.pop(key, None)

    def _show(self, key: EndpointKey) -> None:
        self._counters.set_others(key, self.amounts(key))

    def _forget(self) -> None:
        _, _, key, amounts = self._unheard.popleft()
        ahead = difference(self._ahead[key], amounts)
        if any(ahead):
            self._ahead[key] = ahead
        else:
            del self._ahead[key]
        self._show(key)
