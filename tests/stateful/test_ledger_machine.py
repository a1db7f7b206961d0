"""The ledger against a dict, under any interleaving of its calls, for placements of one leg and of two."""

from collections.abc import Hashable
from dataclasses import dataclass
from typing import Any

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from metadata_center.errors import CapacityError
from metadata_center.load.ledger import Entry, Ledger, LedgerBounds

ENDPOINTS = ("a", "b", "c")
LEASE_S, TOMBSTONE_S = 8.0, 4.0
PAIRS = ("3", "4", "5")
"""Requests whose placement has two legs; the others have one."""

ids = st.sampled_from(["1", "2", *PAIRS])
legs = st.integers(0, 1)
endpoints = st.sampled_from(ENDPOINTS)
tokens = st.integers(0, 1000)

Leg = tuple[str, int]


class Sums:
    """Accounts that add up and never hold less than nothing."""

    def __init__(self) -> None:
        self.totals = {name: [0] * 6 for name in ENDPOINTS}

    def place(self, endpoint: str) -> str:
        """Every endpoint is its own place."""
        return endpoint

    def put(self, entry: Entry[Any, Any, str]) -> None:
        """Add."""
        self._add(entry, 1)

    def take(self, entry: Entry[Any, Any, str]) -> None:
        """Take off."""
        self._add(entry, -1)

    def take_prefill(self, entry: Entry[Any, Any, str]) -> None:
        """Take a prefill off."""
        assert entry.prefill_held
        self._change(entry.place, (0, -1, -entry.prefill_tokens, 0, 0, -entry.prompt_length))

    def _add(self, entry: Entry[Any, Any, str], sign: int) -> None:
        held = entry.prefill_held
        amounts = (
            *(1, held, held * entry.prefill_tokens),
            *(entry.context_tokens, entry.generated_tokens, held * entry.prompt_length),
        )
        self._change(entry.place, tuple(sign * amount for amount in amounts))

    def _change(self, place: str, amounts: tuple[int, ...]) -> None:
        total = self.totals[place]
        for kind, amount in enumerate(amounts):
            total[kind] += amount
            assert total[kind] >= 0


@dataclass
class Charged:
    """A leg in flight, as the model has it."""

    endpoint: str
    prefill: int
    context: int
    length: int
    lease_s: float
    due_s: float | None
    held: bool = True
    generated: int = 0


class LedgerMachine(RuleBasedStateMachine):
    """Drives the ledger and a model of it side by side."""

    def __init__(self) -> None:
        super().__init__()
        self.sums = Sums()
        self.ledger: Ledger[str, str, str] = Ledger(self.sums, LedgerBounds(LEASE_S, TOMBSTONE_S))
        self.now_s = 0.0
        self.charged: dict[Leg, Charged] = {}
        self.buried: dict[Hashable, float] = {}  # a request or a leg, until when
        self.prefilled: dict[Leg, float] = {}

    @initialize(start=st.integers(0, 1000))
    def start(self, start: int) -> None:
        """Time begins anywhere."""
        self.now_s = float(start)

    @rule(
        name=ids,
        leg=legs,
        endpoint=endpoints,
        prefill=tokens,
        context=tokens,
        length=tokens,
        due=st.none() | st.integers(0, 6),
    )
    def charge(
        self, name: str, leg: int, endpoint: str, prefill: int, context: int, length: int, due: int | None
    ) -> None:
        """Charge if the leg is neither in flight nor void; without a prefill if that has ended."""
        leg, placed = self.leg_of(name, leg), 2 if name in PAIRS else 1
        due_s = None if due is None else self.now_s + due
        new = (name, leg) not in self.charged and not self.is_buried(name, leg)
        assert new is self.ledger.charge(
            name, endpoint, prefill, context, self.now_s, due_s, leg, placed, length
        )
        if new:
            made = Charged(endpoint, prefill, context, length, self.now_s + LEASE_S, due_s)
            made.held = self.prefilled.get((name, leg), 0.0) <= self.now_s
            self.charged[name, leg] = made

    @rule(name=ids, leg=legs, endpoint=endpoints, prefill=st.none() | tokens)
    def move(self, name: str, leg: int, endpoint: str, prefill: int | None) -> None:
        """Carry one leg over; the other stays."""
        leg = self.leg_of(name, leg)
        found = self.charged.get((name, leg))
        assert self.ledger.move(name, endpoint, self.now_s, prefill, leg) is (found is not None)
        if found is not None:
            if endpoint != found.endpoint and prefill is not None and found.held:
                found.prefill = prefill
            found.endpoint, found.lease_s = endpoint, self.now_s + LEASE_S

    @rule(name=ids, leg=legs, generated=st.none() | tokens, context=st.none() | tokens)
    def refresh(self, name: str, leg: int, generated: int | None, context: int | None) -> None:
        """Start one leg's lease anew, and correct what is known of it."""
        leg = self.leg_of(name, leg)
        found = self.charged.get((name, leg))
        refreshed = self.ledger.refresh(name, self.now_s, generated, context, leg)
        assert refreshed is (found is not None)
        if found is not None:
            found.lease_s = self.now_s + LEASE_S
            found.generated = found.generated if generated is None else generated
            if context is not None:
                found.prefill = max(0, found.prefill + context - found.context)
                found.context = context

    @rule(name=ids, leg=legs)
    def release_prefill(self, name: str, leg: int) -> None:
        """True once for each leg."""
        leg = self.leg_of(name, leg)
        found = self.charged.get((name, leg))
        assert self.ledger.release_prefill(name, leg) is (found is not None and found.held)
        if found is not None:
            found.held = False

    @rule(name=ids, leg=legs)
    def bury_prefill(self, name: str, leg: int) -> None:
        """News of a prefill's end overtook its charge; late news of a leg in flight or ended is none."""
        leg = self.leg_of(name, leg)
        self.ledger.bury_prefill(name, self.now_s, leg)
        known = self.prefilled.get((name, leg), 0.0) > self.now_s
        if (name, leg) not in self.charged and not self.is_buried(name, leg) and not known:
            self.prefilled[name, leg] = self.now_s + TOMBSTONE_S

    @rule(name=ids)
    def release(self, name: str) -> None:
        """All legs go; a tombstone stays for those that were not charged."""
        gone = [leg for leg in self.charged if leg[0] == name]
        complete = any(leg[1] == 0 for leg in gone) and name not in PAIRS
        assert self.ledger.release(name, self.now_s) is bool(gone)
        for leg in gone:
            del self.charged[leg]
        if not complete:
            self.buried[name] = self.now_s + TOMBSTONE_S

    @rule(name=ids, leg=legs)
    def release_leg(self, name: str, leg: int) -> None:
        """One leg goes, and the other stays."""
        leg = self.leg_of(name, leg)
        found = self.charged.pop((name, leg), None)
        assert self.ledger.release_leg(name, leg, self.now_s) is (found is not None)
        if found is None:
            self.buried[name, leg] = self.now_s + TOMBSTONE_S
            self.prefilled.pop((name, leg), None)  # one tombstone per name, the last

    @rule(seconds=st.integers(0, 5))
    def advance(self, seconds: int) -> None:
        """Release exactly what is due."""
        self.now_s += seconds
        prefills = sorted(
            name
            for (name, _), found in self.charged.items()
            if found.held and found.due_s is not None and found.due_s <= self.now_s
        )
        lost = [leg for leg, found in self.charged.items() if found.lease_s <= self.now_s]
        left = {name for name, leg in self.charged if (name, leg) not in lost}
        expired = self.ledger.advance(self.now_s)
        assert sorted(expired.prefills) == prefills
        assert sorted(expired.requests) == sorted({name for name, _ in lost} - left)
        for found in self.charged.values():
            if found.due_s is not None and found.due_s <= self.now_s:
                found.held = False
        for leg in lost:
            del self.charged[leg]

    def leg_of(self, name: str, leg: int) -> int:
        """A leg that the request's placement has."""
        return leg if name in PAIRS else 0

    def is_buried(self, name: str, leg: int) -> bool:
        """Its end was reported first."""
        return max(self.buried.get(name, 0.0), self.buried.get((name, leg), 0.0)) > self.now_s

    @invariant()
    def accounts_are_the_sum_of_the_legs(self) -> None:
        """What is counted is what the legs in flight are charged: never more, never negative."""
        for name, total in self.sums.totals.items():
            here = [found for found in self.charged.values() if found.endpoint == name]
            assert total == [
                len(here),
                sum(found.held for found in here),
                sum(found.prefill for found in here if found.held),
                sum(found.context for found in here),
                sum(found.generated for found in here),
                sum(found.length for found in here if found.held),
            ]
        assert len(self.ledger) == len(self.charged)
        for name in ("1", *PAIRS):
            assert self.ledger.legs(name) == tuple(sorted(leg for of, leg in self.charged if of == name))

    def teardown(self) -> None:
        """Once all leases are over, every account is exactly zero and nothing is remembered."""
        self.ledger.advance(self.now_s + LEASE_S)
        assert not any(map(any, self.sums.totals.values()))
        assert len(self.ledger) == 0
        assert not self.ledger._further
        assert not self.ledger._tombstones


TestLedger = LedgerMachine.TestCase
TestLedger.settings = settings(max_examples=100, stateful_step_count=40, deadline=None)


def test_what_is_refused_changes_nothing() -> None:
    """A bound, a leg that the placement has not, a negative amount: nothing is charged."""
    sums = Sums()
    ledger: Ledger[str, str, str] = Ledger(sums, LedgerBounds(max_legs=1))
    for leg, placed in ((1, 1), (2, 2), (-1, 2)):
        with pytest.raises(ValueError):
            ledger.charge("1", "a", 1, 1, 0.0, leg=leg, legs=placed)
    with pytest.raises(ValueError):
        ledger.charge("1", "a", 1, 1, 0.0, prompt_length=-1)
    assert ledger.charge("1", "a", 1, 1, 0.0, leg=1, legs=2)
    with pytest.raises(CapacityError):
        ledger.charge("1", "b", 1, 1, 0.0, leg=0, legs=2)
    with pytest.raises(ValueError):
        ledger.refresh("1", 0.0, context_tokens=-1, leg=1)
    assert sums.totals["a"] == [1, 1, 1, 1, 0, 0]
    assert ledger.release("1", 0.0)
    assert not any(map(any, sums.totals.values()))
