"""The configuration in force against a model, over all orders of edits, answers and time.

The model is what an operator expects: the last good reading is in force once its names had their word, each
name has the addresses of its last good answer, and nothing older ever comes back.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from extproc.config.clusters import ClusterSpec, EndpointSpec
from extproc.config.schema import Config
from extproc.discovery.following import (
    GATHER_S,
    Apply,
    Effect,
    Following,
    Introduce,
    LookUp,
    NameAnswers,
    NameFailed,
    Refused,
    Version,
)
from extproc.discovery.resolution import resolved

INTERVAL_S = 5.0
WAIT_S = 1.0
INTRODUCE_S = 3.0
NAMES = ("a.svc", "b.svc", "c.svc")
ADDRESSES = ("192.0.2.1", "192.0.2.2", "2001:db8::1")
FILES = ("tokenway.yaml", "clusters.json")

names = st.lists(st.sampled_from(NAMES), unique=True)


class FollowingMachine(RuleBasedStateMachine):
    """`Following` beside what it is to end with."""

    def __init__(self) -> None:
        super().__init__()
        self.now_s = 100.0
        self.machine = Following(interval_s=INTERVAL_S, wait_s=WAIT_S, introduce_s=INTRODUCE_S)
        self.readings = 0
        self.last_good: Version | None = None
        self.last_good_s = 0.0
        self.last_good_generation = 0
        self.last: Version | Refused | None = None
        self.open: dict[int, str] = {}
        """Questions without an answer, those of forgotten names too."""
        self.latest_question: dict[str, int] = {}
        self.known: dict[str, tuple[str, ...]] = {}
        self.failing: set[str] = set()
        self.applied: list[Apply] = []
        self.coming: Introduce | None = None
        self.coming_s = 0.0
        """Since when something is introduced and nothing new was in force."""

    @rule(used=names, literal=st.booleans())
    def edit(self, used: list[str], literal: bool) -> None:
        """A good version, whose weight distinguishes it from all others."""
        addresses = [*used, *(["10.0.0.1"] if literal else [])]
        self.readings += 1
        specs = tuple(EndpointSpec(address, 80, weight=self.readings) for address in addresses)
        version = Version(Config(), (ClusterSpec("c", specs),), FILES)
        self.last = self.last_good = version
        self.last_good_s, self.last_good_generation = self.now_s, self.readings
        self.take(self.machine.read(version, self.now_s))

    @rule(file=st.sampled_from(FILES))
    def broken_edit(self, file: str) -> None:
        """A reading that is refused."""
        self.readings += 1
        self.last = refused = Refused(f"/etc/{file}", ("line 1: no",), file, FILES)
        effects = self.machine.read(refused, self.now_s)
        assert effects == [refused]

    @precondition(lambda self: self.open)
    @rule(data=st.data(), found=st.lists(st.sampled_from(ADDRESSES), unique=True))
    def answer(self, data: st.DataObject, found: list[str]) -> None:
        """Any open question is answered, be it forgotten or not; without addresses that is a failure."""
        number = data.draw(st.sampled_from(sorted(self.open)))
        name = self.open.pop(number)
        if self.latest_question.get(name) == number and found:
            self.known[name] = tuple(sorted(found))
        self.take(self.machine.answered(name, number, found, self.now_s))

    @precondition(lambda self: self.open)
    @rule(data=st.data())
    def failure(self, data: st.DataObject) -> None:
        """Any open question fails."""
        number = data.draw(st.sampled_from(sorted(self.open)))
        name = self.open.pop(number)
        self.take(self.machine.failed(name, number, "no such name", self.now_s))

    @rule(data=st.data())
    def acknowledged(self, data: st.DataObject) -> None:
        """Envoy has the clusters of some reading; only of the one that is introduced does it matter."""
        generation = data.draw(st.integers(0, self.readings + 1))
        effects = self.machine.introduced(generation)
        assert bool(effects) == (self.coming is not None and self.coming.generation == generation)
        self.take(effects)

    @rule(data=st.data())
    def spurned(self, data: st.DataObject) -> None:
        """Envoy refuses the clusters of some reading: what is in force stays so."""
        generation = data.draw(st.integers(0, self.readings + 1))
        coming = self.coming
        effects = self.machine.spurned(generation, ["no"])
        if coming is None or coming.generation != generation:
            assert effects == []
            return
        (refused,) = effects
        assert isinstance(refused, Refused)
        self.coming = None
        if self.last is coming.version:
            self.last = refused
        if self.last_good_generation == generation:
            self.last_good, self.last_good_generation = self.machine.in_force, self.applied[-1].generation
        self.forget()

    @rule(name=st.sampled_from(NAMES), number=st.integers(1, 40))
    def unasked_answer(self, name: str, number: int) -> None:
        """What answers no open question changes nothing."""
        if number not in self.open:
            assert self.machine.answered(name, number, ["192.0.2.99"], self.now_s) == []

    @rule(seconds=st.sampled_from([0.01, GATHER_S, 0.5, WAIT_S, INTRODUCE_S, INTERVAL_S]))
    def time_passes(self, seconds: float) -> None:
        """Later; the shell calls when it was asked to, and once more for nothing."""
        until_s = self.now_s + seconds
        while (due_s := self.machine.next_s()) is not None and due_s <= until_s:
            self.now_s = max(self.now_s, due_s)
            self.take(self.machine.advance(self.now_s))
        self.now_s = until_s
        self.take(self.machine.advance(self.now_s))

    @rule()
    def asked_again(self) -> None:
        """A reload by hand looks all names up, each of them once at a time."""
        self.take(self.machine.ask_again(self.now_s))
        assert {self.open[self.latest_question[name]] for name in self.machine.names()} == set(
            self.machine.names()
        )

    def take(self, effects: Iterable[Effect]) -> None:
        """Carry effects out, and check each."""
        for effect in effects:
            match effect:
                case LookUp():
                    assert self.latest_question.get(effect.name) not in self.open, "asked twice at a time"
                    self.open[effect.number] = effect.name
                    self.latest_question[effect.name] = effect.number
                case Introduce():
                    assert self.applied, "the first is in force at once"
                    self.coming_s = self.now_s if self.coming is None else self.coming_s
                    self.coming = effect
                case Apply():
                    if effect.is_new and self.applied:
                        assert self.coming is not None
                        assert effect.version is self.coming.version
                        self.coming = None
                    before = self.applied[-1] if self.applied else None
                    assert before is None or effect.generation >= before.generation
                    assert effect.is_new == (before is None or effect.generation > before.generation)
                    self.applied.append(effect)
                case NameFailed():
                    assert effect.name not in self.failing
                    assert effect.kept == self.known.get(effect.name, ())
                    self.failing.add(effect.name)
                case NameAnswers():
                    assert effect.name in self.failing
                    self.failing.discard(effect.name)
        self.forget()

    def forget(self) -> None:
        """Names of no version any more are forgotten with all that was known of them."""
        used = self.machine.names()
        self.known = {name: found for name, found in self.known.items() if name in used}
        self.failing &= used.keys()
        self.latest_question = {name: n for name, n in self.latest_question.items() if name in used}

    @invariant()
    def the_last_good_reading_is_in_force_or_waits(self) -> None:
        """For its names `WAIT_S` at most, then for Envoy `INTRODUCE_S`; the one before stays so long."""
        if self.last_good is None:
            assert self.machine.in_force is None
            return
        if self.coming is not None and self.coming.version is self.last_good:
            assert self.machine.in_force is not self.last_good
            assert self.now_s < self.coming_s + INTRODUCE_S
        elif self.machine.in_force is not self.last_good:
            assert self.now_s < self.last_good_s + WAIT_S
            wanted = {spec.address for spec in self.last_good.clusters[0].endpoints if spec.is_host_name}
            assert any(name not in self.known and name not in self.failing for name in wanted)
        else:
            assert self.applied[-1].generation == self.last_good_generation
            assert self.applied[-1].version is self.last_good

    @invariant()
    def addresses_are_those_of_the_last_good_answers(self) -> None:
        """But for what is gathered for a moment; then they are exactly so."""
        in_force = self.machine.in_force
        if in_force is None:
            return
        assert self.applied[-1].resolution == self.machine.resolution
        due_s = self.machine.next_s()
        if resolved(in_force.clusters, self.known) != self.machine.resolution:
            assert due_s is not None
            assert due_s <= self.now_s + GATHER_S

    @invariant()
    def what_is_reported_is_the_last_reading(self) -> None:
        """Files are good unless the last reading refused them; names fail unless they answered last."""
        assert self.machine.generation == self.readings
        refused = self.last.file if isinstance(self.last, Refused) else None
        expected = {} if self.last is None else {file: file != refused for file in FILES}
        assert self.machine.files() == expected
        for name, is_good in self.machine.names().items():
            assert is_good == (name in self.known and name not in self.failing)

    @invariant()
    def only_names_in_use_are_kept(self) -> None:
        """Those of the version in force, of the one that is introduced and of the one that waits."""
        coming = None if self.coming is None else self.coming.version
        versions: list[Any] = [one for one in (self.machine.in_force, coming, self.last_good) if one]
        used = {spec.address for version in versions for spec in version.clusters[0].endpoints}
        assert set(self.machine.names()) == used & set(NAMES)


TestFollowingMachine = FollowingMachine.TestCase
