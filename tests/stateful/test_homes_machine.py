"""Where responses live, against a plain list, under any order of learning, asking and time."""

from __future__ import annotations

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from extproc.routing.homes import Homes
from metadata_center.types import EndpointKey

EXPIRY_S = 10.0
BOUND = 4

endpoints = st.sampled_from([EndpointKey(f"10.0.0.{number}:8000") for number in range(3)])
numbers = st.integers(0, 7)


class HomesMachine(RuleBasedStateMachine):
    """The model is a list of (key, endpoint, last use), the least recently used first."""

    def __init__(self) -> None:
        super().__init__()
        self.homes = Homes(BOUND, EXPIRY_S)
        self.known: list[tuple[int, EndpointKey, float]] = []
        self.now_s = 0.0

    def remembered(self, key: int) -> tuple[int, EndpointKey, float] | None:
        """The entry of a key."""
        return next((entry for entry in self.known if entry[0] == key), None)

    @rule(seconds=st.sampled_from([0.1, 4.0, EXPIRY_S, 11.0]))
    def wait(self, seconds: float) -> None:
        """Let time pass."""
        self.now_s += seconds

    @rule(key=numbers, endpoint=endpoints)
    def learn(self, key: int, endpoint: EndpointKey) -> None:
        """The newest word counts; news is what was not known."""
        before = self.remembered(key)
        assert self.homes.learn(key, endpoint, self.now_s) is (before is None or before[1] != endpoint)
        self.known = [entry for entry in self.known if entry[0] != key]
        self.known = [*self.known, (key, endpoint, self.now_s)][-BOUND:]

    @rule(key=numbers)
    def find(self, key: int) -> None:
        """Finding is use; what expired is gone."""
        before = self.remembered(key)
        found = self.homes.find(key, self.now_s)
        self.known = [entry for entry in self.known if entry[0] != key]
        if before is None or self.now_s - before[2] > EXPIRY_S:
            assert found is None
        else:
            assert found == before[1]
            self.known.append((key, before[1], self.now_s))

    @rule()
    def inform_a_newcomer(self) -> None:
        """It then knows all there is."""
        newcomer = Homes(BOUND, EXPIRY_S)
        for endpoint, chain in self.homes.latest().items():
            assert newcomer.hear(endpoint, chain, self.now_s)
        for key, endpoint, _ in self.known:
            assert newcomer.find(key, self.now_s) == endpoint

    @invariant()
    def is_bounded(self) -> None:
        """Never more than the bound."""
        assert len(self.homes) == len(self.known) <= BOUND


TestHomes = HomesMachine.TestCase
TestHomes.settings = settings(max_examples=100, stateful_step_count=40)
