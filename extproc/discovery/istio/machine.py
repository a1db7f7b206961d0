"""The client of istiod as a state machine: what to ask, what to believe, what to report to the fleet.

Rules:
    1. Pure. Events come in, effects to carry out go out, in order; the time is an argument.
    2. CDS says what exists, EDS who its members are: istiod answers for a service that is not there with an
       empty assignment. EDS is asked only for services that the configuration names, and their subsets.
    3. Subscriptions change in requests of their own, with an empty nonce; an answer to a response has none.
    4. A resource that cannot be used is refused, with the reason, and stays as it was. What else its response
       says is taken: istiod says nothing twice.
    5. What was reported stays while istiod is away. After a reconnection services go only when the first CDS
       response of the new stream, which has all of them, does not; members change by the new EDS responses.
    6. Reported is only what differs from what was reported before.
    7. A stream that ends, or whose first response does not come, is opened again after a wait that doubles
       with each failure, with jitter, up to `MAX_WAIT_S`. A response that is larger than the limit on
       messages raises the limit, up to `MAX_LIMIT_BYTES`.
    8. A response is answered behind what it has the fleet do: when it is accepted, it is in force.
    9. A name that the configuration has newly opens the stream anew, which has istiod say everything again:
       nothing is remembered of services that no rule names.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Final

from extproc.discovery.istio.effects import Connect, Effect, LookUp, Refused, Send, TooLarge, Update
from extproc.discovery.istio.listing import listed_of
from extproc.discovery.istio.messages import (
    ASSIGNMENTS,
    CLUSTERS,
    ClusterFacts,
    Decoder,
    MalformedError,
    Members,
    Request,
    Resource,
    Response,
)
from extproc.discovery.istio.names import HostNames
from extproc.discovery.listed import Listed
from extproc.values.choices import Rng
from extproc.values.mesh_names import MeshName
from metadata_center.addresses import ip_or_none
from metadata_center.backoff import Backoff

FIRST_WAIT_S: Final = 0.25
MAX_WAIT_S: Final = 10.0
"""Between two attempts, before jitter."""

STEADY_S: Final = 10.0
"""A stream in sync that lasted this long starts over with `FIRST_WAIT_S`."""

FIRST_RESPONSE_S: Final = 30.0
"""A stream without a response for this long is given up."""

FIRST_LIMIT_BYTES: Final = 4 * 1024 * 1024
"""gRPC's own default."""

MAX_LIMIT_BYTES: Final = 256 * 1024 * 1024
"""Some 100,000 clusters in one response."""

MAX_SUBSCRIPTIONS: Final = 16_384
"""Services that rules name, with all their subsets."""

_GROWTH: Final = 4

_MAX_PROBLEMS: Final = 8
"""Of a response that are named."""


_Services = Mapping[MeshName, Mapping[str, ClusterFacts]]


@dataclass(slots=True)
class _Draft:
    """What a CDS response comes to.

    Attributes:
        room: For so many clusters more.
        services: Those that it names, with all their clusters.
        touched: Those of them that differ.
    """

    room: int
    services: dict[MeshName, dict[str, ClusterFacts]] = field(default_factory=dict)
    touched: set[MeshName] = field(default_factory=set)


@dataclass(slots=True)
class _Stream:
    """The one that is open, or being opened.

    Attributes:
        number: Tells it from those before.
        since_s: When it was asked for.
        has_clusters: Its first CDS response was taken.
        subscribed: EDS names that were asked for.
        answered: Those of them that came, good or not.
        problems: With what the parts of a response said that came so far.
        draft: What the parts of a CDS response said that came so far; None between responses.
        synced_s: When it was in sync first.
    """

    number: int
    since_s: float
    has_clusters: bool
    subscribed: set[str]
    answered: set[str]
    problems: list[str] = field(default_factory=list)
    draft: _Draft | None = None
    synced_s: float | None = None


class IstioClient:
    """The machine; owned by one event loop.

    Args:
        decoder: Reads resources.
        rng: Jitter.

    Attributes:
        has_first_state: Everything that istiod lists was reported once.
        updates: Reports to the fleet.
        rejects: Responses with something that was refused.
    """

    def __init__(self, decoder: Decoder, rng: Rng) -> None:
        self._decoder = decoder
        self._wanted: frozenset[MeshName] = frozenset()
        self._listed: dict[MeshName, dict[str, ClusterFacts]] = {}
        self._members: dict[str, Members] = {}
        self._reported: dict[str, tuple[Listed, ...]] = {}
        self._names = HostNames()
        self._named: dict[MeshName, set[str]] = {}
        self._stream: _Stream | None = None
        self._streams = 0
        self._limit_bytes = FIRST_LIMIT_BYTES
        self._backoff = Backoff(rng, first_s=FIRST_WAIT_S, most_s=MAX_WAIT_S, steady_s=STEADY_S)
        self._retry_s: float | None = None
        self._synced_s: float | None = None
        self._began_s = 0.0
        self.has_first_state = False
        self.updates = 0
        self.rejects = 0

    @property
    def is_connected(self) -> bool:
        """A stream is open, and answers."""
        return self._stream is not None and self._stream.has_clusters

    @property
    def is_in_sync(self) -> bool:
        """The fleet has all that istiod lists, as far as the configuration names it."""
        stream = self._stream
        return (
            stream is not None
            and stream.has_clusters
            and stream.answered >= stream.subscribed
            and self._names.are_judged
        )

    def age_s(self, now_s: float) -> float:
        """Since it was last in sync, 0 if it is; since it began if it never was."""
        if self.is_in_sync:
            return 0.0
        return max(0.0, now_s - (self._began_s if self._synced_s is None else self._synced_s))

    def next_s(self) -> float | None:
        """When `advance` has something to do; None: nothing happens by time alone."""
        times = [self._retry_s, self._names.next_s()]
        if self._stream is not None and not self._stream.has_clusters:
            times.append(self._stream.since_s + FIRST_RESPONSE_S)
        return min((time for time in times if time is not None), default=None)

    # Events.

    def begin(self, now_s: float) -> list[Effect]:
        """The process starts."""
        self._began_s = now_s
        return self._connect(now_s)

    def follow(self, names: Iterable[str], now_s: float) -> list[Effect]:
        """The configuration names these clusters; those that are no services of a mesh are none of ours."""
        wanted = frozenset(found for name in names if (found := MeshName.of(name)) is not None)
        new, gone = wanted - self._wanted, self._wanted - wanted
        self._wanted = wanted
        drafts = None if self._stream is None else self._stream.draft
        for service in gone:
            self._listed.pop(service, None)
            if drafts is not None:
                drafts.services.pop(service, None)
        effects = self._subscribe() if gone else []
        effects += self._report(gone, now_s)
        if new and self._stream is not None:
            effects += self._connect(now_s)
        return effects

    def opened(self, number: int) -> list[Effect]:
        """The stream is there: ask for everything that exists."""
        if self._stream is None or self._stream.number != number:
            return []
        return [Send(Request(CLUSTERS, is_first=True))]

    def received(self, number: int, response: Response, now_s: float) -> list[Effect]:
        """A response came, or a part of one (`parting`); parts of one response come together, in order."""
        stream = self._stream
        if stream is None or stream.number != number:
            return []
        before = self.is_in_sync
        if response.type_url == CLUSTERS:
            effects = self._clusters(stream, response, now_s)
        elif response.type_url == ASSIGNMENTS:
            effects = self._assignments(stream, response, now_s)
        else:
            effects = self._judge(response, [f"{response.type_url[:200]} was not asked for"])
        return effects + self._settle(now_s, was_in_sync=before)

    def lost(
        self, number: int, now_s: float, *, is_too_large: bool = False, silent_s: float = 0.0
    ) -> list[Effect]:
        """The stream ended, or could not be opened.

        Args:
            number: Of the stream.
            now_s: When.
            is_too_large: A response was larger than the limit.
            silent_s: How long nothing had been heard from the peer when that was noticed.
        """
        stream = self._stream
        if stream is None or stream.number != number:
            return []
        if self.is_in_sync:
            self._synced_s = max(now_s - silent_s, stream.synced_s or now_s)
        self._stream = None
        if is_too_large:
            return self._grow(now_s)
        self._wait(now_s, 0.0 if stream.synced_s is None else now_s - stream.synced_s)
        return []

    def answered(self, name: str, addresses: Iterable[str], now_s: float) -> list[Effect]:
        """A look-up ended; without addresses if it failed."""
        before = self.is_in_sync
        changed = self._names.answered(name, addresses, now_s)
        concerned = self._named_by(name) if changed else ()
        return self._report(concerned, now_s) + self._settle(now_s, was_in_sync=before)

    def advance(self, now_s: float) -> list[Effect]:
        """Time has passed."""
        effects: list[Effect] = [LookUp(name) for name in self._names.due(now_s)]
        stream = self._stream
        if stream is not None and not stream.has_clusters and now_s >= stream.since_s + FIRST_RESPONSE_S:
            self._stream = None
            self._wait(now_s)
        if self._retry_s is not None and now_s >= self._retry_s:
            effects += self._connect(now_s)
        return effects

    # The stream.

    def _connect(self, now_s: float) -> list[Effect]:
        if self.is_in_sync:
            self._synced_s = now_s
        self._streams += 1
        self._retry_s = None
        self._stream = _Stream(self._streams, now_s, has_clusters=False, subscribed=set(), answered=set())
        return [Connect(self._streams, self._limit_bytes)]

    def _wait(self, now_s: float, stood_s: float = 0.0) -> None:
        self._retry_s = now_s + self._backoff.after(stood_s)

    def _grow(self, now_s: float) -> list[Effect]:
        limit_bytes = self._limit_bytes
        self._limit_bytes = min(limit_bytes * _GROWTH, MAX_LIMIT_BYTES)
        is_final = self._limit_bytes == limit_bytes
        if is_final:
            self.rejects += 1
            self._wait(now_s)
        else:
            self._retry_s = now_s
        return [TooLarge(limit_bytes, is_final)]

    # Responses.

    def _clusters(self, stream: _Stream, response: Response, now_s: float) -> list[Effect]:
        """Parts go into a draft; the last one puts it into force."""
        before = self._listed if stream.has_clusters else {}
        draft = stream.draft
        if draft is None:
            draft = stream.draft = _Draft(MAX_SUBSCRIPTIONS - sum(map(len, before.values())))
        for gone in response.removed:
            name = MeshName.parse(gone)
            if name is not None and name.service in before:
                of_service = draft.services.setdefault(name.service, dict(before[name.service]))
                draft.room += of_service.pop(gone, None) is not None
                draft.touched.add(name.service)
        for resource in response.resources:
            name = MeshName.parse(resource.name)
            if name is not None and name.service in self._wanted:
                self._draft(stream, draft, before, name.service, resource)
        del stream.problems[_MAX_PROBLEMS:]
        return self._in_force(stream, response, draft, now_s) if response.is_last else []

    def _draft(
        self, stream: _Stream, draft: _Draft, before: _Services, service: MeshName, resource: Resource
    ) -> None:
        """One cluster of a service; what cannot be used stays as it was."""
        known = facts = self._listed.get(service, {}).get(resource.name)
        try:
            facts = self._decoder.cluster(resource.body)
        except MalformedError as error:
            stream.problems.append(f"{resource.name}: {error}")
        if facts is None:
            return
        of_service = draft.services.get(service)
        if of_service is None:
            of_service = draft.services[service] = dict(before.get(service, ()))
        is_new = resource.name not in of_service
        if draft.room > 0 or not is_new:
            of_service[resource.name] = facts
            draft.room -= is_new
            if facts != known:
                draft.touched.add(service)
        else:
            problem = f"rules name more than {MAX_SUBSCRIPTIONS} clusters and subsets"
            stream.problems.append(f"{resource.name}: {problem}")

    def _in_force(self, stream: _Stream, response: Response, draft: _Draft, now_s: float) -> list[Effect]:
        """A CDS response is whole: what it says is there."""
        before, services, touched = self._listed, draft.services, draft.touched
        if stream.has_clusters:
            listed = {**before, **services}
        else:  # what the first response does not name is gone
            listed = services
            touched |= {one for one, clusters in before.items() if clusters != services.get(one)}
        for service in touched:
            if str(service) not in listed.get(service, ()) or service not in self._wanted:
                listed.pop(service, None)
        problems, stream.problems, stream.draft = stream.problems, [], None
        self._listed, stream.has_clusters = listed, True
        subscription = self._subscribe()
        return self._report(touched, now_s) + self._judge(response, problems) + subscription

    def _assignments(self, stream: _Stream, response: Response, now_s: float) -> list[Effect]:
        found: dict[str, Members] = {name: () for name in response.removed if name in stream.subscribed}
        problems: list[str] = []
        spoilt: set[str] = set()
        for resource in response.resources:
            if resource.name not in stream.subscribed:
                continue
            try:
                found[resource.name] = self._decoder.assignment(resource.body)
            except MalformedError as error:
                problems.append(f"{resource.name}: {error}")
                spoilt.add(resource.name)
        stream.problems += problems[:_MAX_PROBLEMS]
        stream.answered |= found.keys() | spoilt
        same = {name for name, members in found.items() if self._members.get(name) == members}
        self._members.update(found)
        services = {
            name.service
            for one in found.keys() | spoilt
            if (name := MeshName.parse(one)) is not None
            and (one not in same or str(name.service) not in self._reported)
        }
        if not response.is_last:
            return self._report(services, now_s)
        problems, stream.problems = stream.problems, []
        return self._report(services, now_s) + self._judge(response, problems)

    def _judge(self, response: Response, problems: Sequence[str]) -> list[Effect]:
        """Accept a response, or refuse it for these problems."""
        if not problems:
            return [Send(Request(response.type_url, nonce=response.nonce))]
        detail = "; ".join(problems[:_MAX_PROBLEMS])
        self.rejects += 1
        return [
            Send(Request(response.type_url, nonce=response.nonce, error=detail)),
            Refused(response.type_url, detail),
        ]

    def _subscribe(self) -> list[Effect]:
        """Subscribe EDS to exactly the clusters that are listed and whose members are not in them."""
        needed = {
            name
            for clusters in self._listed.values()
            for name, facts in clusters.items()
            if facts.members is None
        }
        for name in self._members.keys() - needed:
            del self._members[name]
        stream = self._stream
        if stream is None or not stream.has_clusters:
            return []
        new, gone = sorted(needed - stream.subscribed), sorted(stream.subscribed - needed)
        if not new and not gone:
            return []
        stream.subscribed = needed
        stream.answered &= needed
        return [Send(Request(ASSIGNMENTS, tuple(new), tuple(gone)))]

    # What follows for the fleet.

    def _report(self, services: Collection[MeshName], now_s: float) -> list[Effect]:
        self._use_names(services, now_s)
        clusters: dict[str, Sequence[Listed] | None] = {}
        for service in services:
            name = str(service)
            listed = self._listing(service)
            if listed is None:
                if service not in self._listed and self._reported.pop(name, None) is not None:
                    clusters[name] = None
            elif self._reported.get(name) != listed:
                clusters[name] = self._reported[name] = listed
        if not clusters:
            return []
        self.updates += 1
        return [Update(clusters)]

    def _listing(self, service: MeshName) -> tuple[Listed, ...] | None:
        """The endpoints of a service; None if it is not there, or not enough is known of it yet."""
        clusters = self._listed.get(service)
        if clusters is None:
            return None
        known = {name: self._members_of(name, facts) for name, facts in clusters.items()}
        members = known.pop(str(service))
        answered = set() if self._stream is None else self._stream.answered
        is_whole = all(
            of_subset is not None or name in answered for name, of_subset in known.items()
        ) and all(map(self._names.is_judged, self._hosts(service)))
        if members is None or (not is_whole and str(service) not in self._reported):
            return None
        subsets = {
            parsed.subset: of_subset
            for name, of_subset in known.items()
            if of_subset is not None and (parsed := MeshName.parse(name)) is not None
        }
        return listed_of(members, subsets, self._names.addresses)

    def _members_of(self, name: str, facts: ClusterFacts) -> Members | None:
        return self._members.get(name) if facts.members is None else facts.members

    def _hosts(self, service: MeshName) -> set[str]:
        """Host names among the members of a service."""
        name = str(service)
        members = self._members_of(name, self._listed[service][name]) or ()
        return {member.host for member in members if ip_or_none(member.host) is None}

    def _use_names(self, services: Iterable[MeshName], now_s: float) -> None:
        """Look up the names among the members of these, and of those that were looked at before."""
        for service in services:
            hosts = self._hosts(service) if service in self._listed else None
            if hosts:
                self._named[service] = hosts
            else:
                self._named.pop(service, None)
        self._names.use(set().union(*self._named.values()), now_s)

    def _named_by(self, host: str) -> list[MeshName]:
        return [service for service, hosts in self._named.items() if host in hosts]

    def _settle(self, now_s: float, *, was_in_sync: bool) -> list[Effect]:
        """Note whether all is in sync now; ask for the addresses of names that are new."""
        if self.is_in_sync:
            self.has_first_state = True
            if self._stream is not None and self._stream.synced_s is None:
                self._stream.synced_s = now_s
        elif was_in_sync:
            self._synced_s = now_s
        return [LookUp(name) for name in self._names.due(now_s)]
