"""A collection kept as it is at the API server: lists, watches, and all the ways in which these end."""

from __future__ import annotations

import random
from collections.abc import Mapping
from typing import Any

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from extproc.discovery.kubernetes import reflector as module
from extproc.discovery.kubernetes.fields import Object, text_at
from extproc.discovery.kubernetes.messages import (
    Event,
    EventType,
    MalformedMessageError,
    Page,
    event_of,
    page_of,
)
from extproc.discovery.kubernetes.reflector import (
    ABSENT_PAUSE_S,
    ABSENT_S,
    FIRST_LIMIT,
    FIRST_PAUSE_S,
    MAX_OBJECTS,
    MAX_PAUSE_S,
    MAX_RETRY_AFTER_S,
    STEADY_S,
    TOO_LARGE,
    Failure,
    ListPage,
    Pause,
    Reflector,
    Watch,
)

GONE = 410
"""What an API server says of a version that is too old."""


def read(said: Object) -> str | None:
    """What is kept of an object: one word of it."""
    return text_at(said, "spec") or None


def thing(name: str, spec: str, version: str = "7") -> dict[str, Any]:
    """An object."""
    return {"metadata": {"name": name, "resourceVersion": version}, "spec": spec}


def page(*things: Mapping[str, Any], version: str = "100", more: str = "") -> Page:
    """A page of a list."""
    return Page(version, things, more)


def told(kind: EventType, name: str, spec: str, version: str) -> Event:
    """A line of a watch."""
    return Event(kind, thing(name, spec, version), version)


def bookmark(version: str) -> Event:
    """Says only how far the watch is."""
    return Event(EventType.BOOKMARK, {"metadata": {"resourceVersion": version}}, version)


def error(code: int) -> Event:
    """Ends a watch that was granted."""
    return Event(EventType.ERROR, {"code": code, "reason": "Whatever"}, code=code)


def built(*, is_optional: bool = False) -> Reflector[str]:
    """One that has done nothing yet."""
    return Reflector(read, random.Random(1), is_optional=is_optional)


def watching(*things: Mapping[str, Any], version: str = "100", now_s: float = 0.0) -> Reflector[str]:
    """One whose list is there and whose watch was granted."""
    one = built()
    one.next()
    one.listed(page(*things, version=version), now_s)
    one.next()
    one.opened(now_s)
    return one


def after_pauses(one: Reflector[str]) -> tuple[ListPage | Watch, float]:
    """What it does next but wait, and how long it waits before."""
    waited_s = 0.0
    while isinstance(step := one.next(), Pause):
        waited_s += step.seconds
    return step, waited_s


def test_a_list_has_pages_and_counts_with_its_last() -> None:
    """Rule 1: pages of `limit`; the version is that of the list, and nothing is known before its end."""
    one = built()
    assert one.next() == ListPage(FIRST_LIMIT, "")
    assert one.listed(page(thing("a", "1"), version="100", more="t/1"), 1.0) == {}
    assert (dict(one.objects), one.is_synced, one.age_s(1.0)) == ({}, False, None)
    assert one.next() == ListPage(FIRST_LIMIT, "t/1")
    assert one.listed(page(thing("b", "2"), version="100"), 2.0) == {"a": "1", "b": "2"}
    assert (dict(one.objects), one.is_synced) == ({"a": "1", "b": "2"}, True)
    watch = one.next()
    assert isinstance(watch, Watch)
    assert watch.version == "100", "of the collection, not the 7 of an object"


def test_the_length_of_watches_is_drawn() -> None:
    """Rule 2: between 300 and 600 s, so that a thousand gateways do not come back together."""
    drawn = set()
    for seed in range(50):
        one = Reflector(read, random.Random(seed))
        one.next()
        one.listed(page(), 0.0)
        step = one.next()
        assert isinstance(step, Watch)
        drawn.add(step.timeout_s)
    assert min(drawn) >= 300
    assert max(drawn) <= 600
    assert len(drawn) > 40


def test_events_and_bookmarks_move_the_version_on() -> None:
    """Rule 3: the watch goes on from the last of either."""
    one = watching(thing("a", "1"))
    assert one.take(told(EventType.ADDED, "b", "2", "101"), 1.0) == {"b": "2"}
    assert one.take(told(EventType.MODIFIED, "a", "9", "103"), 1.0) == {"a": "9"}
    assert one.take(told(EventType.DELETED, "b", "2", "104"), 1.0) == {"b": None}
    one.ended(10.0)
    step, _ = after_pauses(one)
    assert isinstance(step, Watch)
    assert step.version == "104"
    one.opened(11.0)
    assert one.take(bookmark("250"), 60.0) == {}
    one.ended(400.0)
    step, waited_s = after_pauses(one)
    assert isinstance(step, Watch)
    assert step.version == "250"
    assert waited_s <= FIRST_PAUSE_S, "an end as it is meant to be is no reason to wait"
    assert dict(one.objects) == {"a": "9"}


@pytest.mark.parametrize("form", ["status", "event"])
def test_a_version_that_is_too_old_leads_to_a_list_and_tells_what_is_gone(form: str) -> None:
    """Rule 4: 410 in both forms. Deletions that were missed come out of the difference."""
    one = watching(thing("a", "1"), thing("b", "2"), thing("c", "3"))
    if form == "event":
        assert one.take(error(GONE), 1.0) == {}
        assert not one.is_watching
    else:
        one.ended(1.0)
        after_pauses(one)
        assert one.failed(Failure(GONE, "410 Expired"), 2.0) == {}
    assert dict(one.objects) == {"a": "1", "b": "2", "c": "3"}, "what is known stays until the list is there"
    assert after_pauses(one)[0] == ListPage(FIRST_LIMIT, "")
    assert one.listed(page(thing("a", "1"), thing("c", "4"), thing("d", "5"), version="900"), 3.0) == {
        "b": None,
        "c": "4",
        "d": "5",
    }
    step, _ = after_pauses(one)
    assert isinstance(step, Watch)
    assert step.version == "900"


def test_a_list_whose_token_is_too_old_begins_anew() -> None:
    """What came of its first pages counts for nothing."""
    one = built()
    one.next()
    one.listed(page(thing("a", "1"), more="t/1"), 1.0)
    one.next()
    one.failed(Failure(GONE, "410 Expired"), 2.0)
    assert after_pauses(one)[0] == ListPage(FIRST_LIMIT, "")
    assert one.listed(page(thing("b", "2")), 3.0) == {"b": "2"}


@pytest.mark.parametrize("status", [None, 401, 403, 429, 500, 503])
def test_after_any_other_end_the_watch_goes_on_from_where_it_was(status: int | None) -> None:
    """Rule 5: with a pause that grows and has jitter, and the last state all the while."""
    one = watching(thing("a", "1"))
    one.take(told(EventType.ADDED, "b", "2", "101"), 1.0)
    pauses = []
    for _ in range(module._TRIES):
        one.failed(Failure(status, "broken"), 2.0)
        step, waited_s = after_pauses(one)
        assert isinstance(step, Watch)
        assert step.version == "101"
        pauses.append(waited_s)
    assert pauses == sorted(pauses), pauses
    assert 0.5 * FIRST_PAUSE_S <= pauses[0] <= FIRST_PAUSE_S
    assert dict(one.objects) == {"a": "1", "b": "2"}


@pytest.mark.parametrize("status", [400, 404, 422, 504])
def test_a_watch_that_is_refused_for_what_it_asks_is_listed_anew(status: int) -> None:
    """A version of a server that was restored from an older state is too large for it: 504."""
    one = watching(thing("a", "1"))
    one.ended(1.0)
    after_pauses(one)
    one.failed(Failure(status, "no"), 2.0)
    assert after_pauses(one)[0] == ListPage(FIRST_LIMIT, "")


def test_a_watch_that_goes_on_failing_is_listed_anew() -> None:
    """500 may be about the moment, or about what was asked."""
    one = watching(thing("a", "1"))
    for _ in range(module._TRIES):
        one.failed(Failure(500, "InternalError"), 1.0)
        assert isinstance(after_pauses(one)[0], Watch)
    one.failed(Failure(500, "InternalError"), 1.0)
    assert isinstance(after_pauses(one)[0], ListPage)


def test_pauses_grow_to_a_bound_and_shrink_after_a_watch_that_held() -> None:
    """A server that is away for long is asked every 10 s; after a watch of 5 s a pause is short again."""
    one = watching()
    waits = []
    for _ in range(40):
        one.failed(Failure(None, "ClientConnectorError"), 1.0)
        waits.append(after_pauses(one)[1])
    assert 0.5 * MAX_PAUSE_S <= waits[-1] <= max(waits) <= MAX_PAUSE_S
    assert len(set(waits[-10:])) == 10, "no two alike"
    one.opened(100.0)
    one.failed(Failure(None, "no answer in time"), 100.0 + STEADY_S)
    assert after_pauses(one)[1] <= FIRST_PAUSE_S


def test_watches_that_end_at_once_and_tell_nothing_are_no_hot_loop() -> None:
    """What cuts every connection is asked less and less often."""
    one = watching()
    waits = []
    for _ in range(12):
        one.ended(0.0)
        waits.append(after_pauses(one)[1])
        one.opened(0.0)
    assert waits[-1] >= 0.5 * MAX_PAUSE_S


def test_lists_that_are_followed_by_410_are_no_hot_loop_either() -> None:
    """The list alone does not make the pause short."""
    one = watching()
    waits = []
    for _ in range(12):
        one.take(error(GONE), 0.0)
        waits.append(after_pauses(one)[1])
        one.listed(page(), 0.0)
        one.next()
        one.opened(0.0)
    assert waits[-1] >= 0.5 * MAX_PAUSE_S


def test_a_server_may_ask_for_a_longer_pause() -> None:
    """`Retry-After`, up to a bound."""
    one = built()
    one.next()
    one.failed(Failure(429, "429 TooManyRequests", 20.0), 0.0)
    assert after_pauses(one)[1] == 20.0
    one.failed(Failure(503, "503", 86_400.0), 0.0)
    assert after_pauses(one)[1] == MAX_RETRY_AFTER_S


@pytest.mark.parametrize("status", [403, 404])
def test_an_optional_kind_that_is_missing_has_no_objects_and_is_asked_for_again(status: int) -> None:
    """Rule 7: it holds nothing up; when it comes it is followed."""
    one = built(is_optional=True)
    one.next()
    assert one.failed(Failure(status, f"{status}"), 0.0) == {}
    assert (one.is_synced, one.is_absent) == (True, True)
    step, waited_s = after_pauses(one)
    assert step == ListPage(FIRST_LIMIT, "")
    assert 0.5 * ABSENT_PAUSE_S <= waited_s <= 1.5 * ABSENT_PAUSE_S
    assert one.listed(page(thing("a", "1")), 60.0) == {"a": "1"}
    assert not one.is_absent


def test_an_optional_kind_that_was_there_is_gone_when_404_lasts() -> None:
    """A server that starts may say 404 for a moment of what it has."""
    one = built(is_optional=True)
    one.next()
    one.listed(page(thing("a", "1")), 0.0)
    assert one.failed(Failure(404, "404"), 10.0) == {}
    assert one.failed(Failure(404, "404"), 10.0 + ABSENT_S - 1) == {}
    assert dict(one.objects) == {"a": "1"}
    assert one.failed(Failure(404, "404"), 10.0 + ABSENT_S) == {"a": None}
    assert dict(one.objects) == {}


def test_an_optional_kind_that_may_not_be_read_any_more_stays_as_it_was() -> None:
    """403 says something of us, nothing of the objects."""
    one = built(is_optional=True)
    one.next()
    one.listed(page(thing("a", "1")), 0.0)
    for now_s in (10.0, 500.0):
        assert one.failed(Failure(403, "403"), now_s) == {}
    assert dict(one.objects) == {"a": "1"}


@pytest.mark.parametrize("status", [403, 404])
def test_a_kind_that_is_needed_is_not_taken_for_empty(status: int) -> None:
    """A pool whose kind is not installed yet is not known, and asked for as what fails is."""
    one = built()
    one.next()
    one.failed(Failure(status, f"{status}"), 0.0)
    assert not one.is_synced
    assert one.problem == f"{status}"
    assert after_pauses(one)[1] <= FIRST_PAUSE_S


def test_its_age_grows_while_the_server_is_away_and_nothing_is_forgotten() -> None:
    """Rule 8: 0 during a watch, and the time since it broke off after that."""
    one = watching(thing("a", "1"), now_s=100.0)
    assert one.age_s(150.0) == 0.0
    one.take(told(EventType.MODIFIED, "a", "2", "101"), 160.0)
    one.failed(Failure(None, "no answer in time"), 250.0)
    assert one.age_s(310.0) == 150.0, "since the last word: the rest of the watch was silence"
    one.next()
    one.failed(Failure(None, "ClientConnectorError"), 311.0)
    assert one.age_s(400.0) == 240.0
    assert dict(one.objects) == {"a": "2"}
    after_pauses(one)
    one.opened(401.0)
    assert one.age_s(420.0) == 0.0
    one.ended(430.0)
    assert one.age_s(431.0) == 1.0


def test_what_is_told_twice_makes_no_difference() -> None:
    """Rule 9: repeated ADDED, MODIFIED without a change, DELETED of what is not there, the same list."""
    one = watching(thing("a", "1"))
    assert one.take(told(EventType.ADDED, "a", "1", "101"), 1.0) == {}
    assert one.take(told(EventType.MODIFIED, "a", "1", "102"), 1.0) == {}
    assert one.take(told(EventType.DELETED, "z", "1", "103"), 1.0) == {}
    one.take(error(GONE), 1.0)
    after_pauses(one)
    assert one.listed(page(thing("a", "1"), version="300"), 2.0) == {}


def test_an_object_that_is_to_be_taken_as_not_there_is_gone() -> None:
    """A pod that has run to its end, say."""
    one = watching(thing("a", "1"), thing("b", ""))
    assert dict(one.objects) == {"a": "1"}
    assert one.take(told(EventType.MODIFIED, "a", "", "101"), 1.0) == {"a": None}
    assert one.take(told(EventType.MODIFIED, "a", "", "102"), 1.0) == {}


def test_what_cannot_be_read_is_listed_anew() -> None:
    """The event that it was is found by its difference."""
    one = watching(thing("a", "1"))
    one.garbled("an event that is not JSON", 1.0)
    assert not one.is_watching
    assert isinstance(after_pauses(one)[0], ListPage)


def test_a_page_that_is_too_large_is_asked_for_in_smaller_ones() -> None:
    """Down to one object."""
    one = built()
    limits = []
    for _ in range(12):
        step, _ = after_pauses(one)
        assert isinstance(step, ListPage)
        limits.append(step.limit)
        one.failed(Failure(TOO_LARGE, "large"), 0.0)
    assert limits[:3] == [500, 250, 125]
    assert limits[-1] == 1


def test_a_list_without_end_is_a_failure_and_changes_nothing() -> None:
    """Rule 7 of the machine: `MAX_OBJECTS`."""
    one = watching(thing("a", "1"))
    one.take(error(GONE), 0.0)
    after_pauses(one)
    for number in range(0, MAX_OBJECTS, 1000):
        many = [thing(f"n{number + i}", "x") for i in range(1000)]
        assert one.listed(page(*many, more="on"), 0.0) == {}
    assert one.problem == f"more than {MAX_OBJECTS} objects"
    assert dict(one.objects) == {"a": "1"}
    assert after_pauses(one)[0] == ListPage(FIRST_LIMIT, "")


def test_events_beyond_the_bound_are_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is known stays, and the problem has a name."""
    monkeypatch.setattr(module, "MAX_OBJECTS", 1)
    one = watching(thing("a", "1"))
    assert one.take(told(EventType.ADDED, "b", "2", "101"), 1.0) == {}
    assert one.problem is not None
    assert one.take(told(EventType.MODIFIED, "a", "2", "102"), 1.0) == {"a": "2"}


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"[]",
        b"{}",
        b'{"metadata": {"resourceVersion": 5}, "items": []}',
        b'{"metadata": {"resourceVersion": ""}, "items": []}',
        b'{"metadata": {"resourceVersion": "1"}, "items": [',
    ],
)
def test_what_is_no_list_is_said_to_be_none(body: bytes) -> None:
    """Without a version nothing can be watched."""
    with pytest.raises(MalformedMessageError):
        page_of(body)


def test_a_list_is_read() -> None:
    """Items that are no objects are left out; no items are none."""
    assert page_of(
        b'{"metadata": {"resourceVersion": "5", "continue": "t"}, "items": [{"a": 1}, 3, null]}'
    ) == (Page("5", ({"a": 1},), "t"))
    assert page_of(b'{"metadata": {"resourceVersion": "5", "continue": null}, "items": null}') == Page(
        "5", ()
    )


@pytest.mark.parametrize(
    "line",
    [
        b"{",
        b'{"type": "PATCHED", "object": {}}',
        b'{"type": "ADDED", "object": {}}',
        b'{"type": "ADDED"}',
        b"7",
    ],
)
def test_what_is_no_event_is_said_to_be_none(line: bytes) -> None:
    """Nothing of it is believed."""
    with pytest.raises(MalformedMessageError):
        event_of(line)


def test_an_error_is_read() -> None:
    """Its code is the status; 500 if it says none."""
    line = b'{"type":"ERROR","object":{"kind":"Status","reason":"Expired","code":410}}'
    assert event_of(line).code == GONE
    assert event_of(b'{"type":"ERROR","object":{"code":"x"}}').code == 500


class AgainstAServer(RuleBasedStateMachine):
    """Whatever happens to lists and watches, what is known ends up as a fresh list has it.

    And the differences add up to it.
    """

    @initialize(seed=st.integers(0, 1000))
    def begin(self, seed: int) -> None:
        """A server with a history, of which it has forgotten a part."""
        self.one = Reflector(read, random.Random(seed))
        self.server: dict[str, str] = {}
        self.log: list[Event] = []
        self.version = 100
        self.oldest = 100
        self.sent = 100
        self.added_up: dict[str, str] = {}
        self.pages: list[Page] = []
        self.now_s = 0.0

    def hear(self, delta: Mapping[str, str | None]) -> None:
        """Add a difference up."""
        for name, one in delta.items():
            if one is None:
                assert name in self.added_up, "gone twice"
                del self.added_up[name]
            else:
                assert self.added_up.get(name) != one, "no difference"
                self.added_up[name] = one

    @rule(name=st.sampled_from("abcd"), spec=st.sampled_from("123"))
    def write(self, name: str, spec: str) -> None:
        """Somebody makes or changes an object."""
        self.version += 1
        kind = EventType.MODIFIED if name in self.server else EventType.ADDED
        self.server[name] = spec
        self.log.append(told(kind, name, spec, str(self.version)))

    @rule(name=st.sampled_from("abcd"))
    def delete(self, name: str) -> None:
        """Somebody takes one away."""
        if name in self.server:
            self.version += 1
            self.log.append(told(EventType.DELETED, name, self.server.pop(name), str(self.version)))

    @rule()
    def compact(self) -> None:
        """The server forgets what was."""
        self.oldest = self.version
        self.log.clear()

    @rule(data=st.data())
    def go_on(self, data: st.DataObject) -> None:
        """The reflector does its next step, which succeeds or fails."""
        self.now_s += 1.0
        one = self.one
        if one.is_watching:
            self.watch(data)
            return
        step = one.next()
        if isinstance(step, Pause):
            return
        if data.draw(st.booleans(), "fails"):
            status = data.draw(st.sampled_from([None, 401, 410, 429, 500, 503, 504]), "status")
            self.hear(one.failed(Failure(status, "x"), self.now_s))
        elif isinstance(step, ListPage):
            self.list(step)
        elif int(step.version) < self.oldest:
            self.hear(one.failed(Failure(GONE, "Expired"), self.now_s))
        else:
            self.sent = int(step.version)
            one.opened(self.now_s)

    def list(self, step: ListPage) -> None:
        """Two objects to a page; a list is as of its first page."""
        if not step.more:
            names = sorted(self.server)
            chunks = [names[i : i + 2] for i in range(0, len(names), 2)] or [[]]
            self.pages = [
                page(
                    *(thing(name, self.server[name]) for name in chunk),
                    version=str(self.version),
                    more="" if i == len(chunks) - 1 else str(i + 1),
                )
                for i, chunk in enumerate(chunks)
            ]
        self.hear(self.one.listed(self.pages[int(step.more or 0)], self.now_s))

    def watch(self, data: st.DataObject) -> None:
        """A watch tells some of what is new, or something twice, or ends in one of its ways."""
        one = self.one
        fresh = [event for event in self.log if int(event.version) > self.sent]
        how = data.draw(
            st.sampled_from(["tell", "again", "bookmark", "end", "break", "expire", "garble"]), "how"
        )
        if self.sent < self.oldest and how in ("tell", "again", "bookmark"):
            how = "expire"  # what was forgotten unsent is never passed over
        if how == "tell" and fresh:
            self.sent = int(fresh[0].version)
            self.hear(one.take(fresh[0], self.now_s))
        elif how == "again" and self.sent == self.version and self.log:
            self.hear(one.take(self.log[-1], self.now_s))
        elif how == "bookmark" and not fresh:
            self.sent = self.version
            self.hear(one.take(bookmark(str(self.version)), self.now_s))
        elif how == "end":
            one.ended(self.now_s)
        elif how == "break":
            self.hear(one.failed(Failure(None, "x"), self.now_s))
        elif how == "expire":
            self.hear(one.take(error(GONE), self.now_s))
        elif how == "garble":
            self.hear(one.garbled("x", self.now_s))

    @invariant()
    def differences_add_up(self) -> None:
        """Whoever listened to the differences knows what the reflector knows."""
        if hasattr(self, "one"):
            assert self.added_up == dict(self.one.objects)

    def teardown(self) -> None:
        """Left alone with a server that answers, it ends up as the server is."""
        if not hasattr(self, "one"):
            return
        for _ in range(200):
            self.now_s += 1.0
            if self.one.is_watching:
                fresh = [event for event in self.log if int(event.version) > self.sent]
                lost = self.sent < self.oldest
                if lost:
                    self.hear(self.one.take(error(GONE), self.now_s))
                    continue
                if not fresh:
                    break
                self.sent = int(fresh[0].version)
                self.hear(self.one.take(fresh[0], self.now_s))
                continue
            step = self.one.next()
            if isinstance(step, ListPage):
                self.list(step)
            elif isinstance(step, Watch):
                if int(step.version) < self.oldest:
                    self.one.failed(Failure(GONE, "x"), self.now_s)
                else:
                    self.sent = int(step.version)
                    self.one.opened(self.now_s)
        assert dict(self.one.objects) == self.server


TestAgainstAServer = AgainstAServer.TestCase
TestAgainstAServer.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)
