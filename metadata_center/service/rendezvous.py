"""Where Tokenway's gateways and AIGW's meet: each kind sees the load of the other as that of its own kind.

Rules:
    1. Messages have no numbers: their order is that of `take_messages`, the same for every follower.
    2. What AIGW's gateways have in flight is the share of one more member, `AIGW/0/<run>`. It exists while
       the service knows an engine from them; its lease is renewed by `renew`.
    3. AIGW names an engine by its address without a port, members by `ip:port`. An address without a port
       stands for every endpoint there that a member has named; a load of members shows under its `ip:port`
       where callers of the cluster use that name, else under the address without a port.
    4. Members do not say which cluster an endpoint is in, so every cluster shows what they load.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable, Sequence
from functools import lru_cache, reduce
from itertools import islice
from typing import Final

from metadata_center.addresses import Address
from metadata_center.load.counters import MAX_ENDPOINTS
from metadata_center.load.kinds import NOTHING, NUM_KINDS, Amounts, least, sum_of
from metadata_center.service.cluster_loads import ClusterLoads, EngineLoad
from metadata_center.service.reservations import reserve
from metadata_center.sharing.messages import (
    MAX_AMOUNT,
    MemberId,
    MessageError,
    Reservation,
    Reserved,
    Row,
    Update,
    encode,
    gateway_of,
)
from metadata_center.sharing.peers import Peers
from metadata_center.types import EndpointKey

AIGW: Final = "aigw-clients"
"""The name of the gateway that the service speaks for; no other may take it."""

AIGW_LEASE_S: Final = 6.0
"""Of that gateway's share, if the service goes silent: as short as members' own."""

_MOST: Final[Amounts] = (MAX_AMOUNT,) * NUM_KINDS


class Rendezvous:
    """The members' shares, AIGW's load as one of them, and the messages for followers.

    Args:
        loads: What AIGW's gateways reported.
        run: Another one for each start of the service, 1..64 letters and digits.
    """

    def __init__(self, loads: ClusterLoads, run: str) -> None:
        self.shares = Peers()
        self._loads = loads
        self._member = MemberId(f"{AIGW}/0/{run}")
        self._sequence = 1  # a snapshot has it before the first message
        self._messages: list[bytes] = []
        self._endpoints: OrderedDict[EndpointKey, str] = OrderedDict()  # host of each, last named last
        self._hosts: dict[str, set[EndpointKey]] = {}
        self._renamed: set[str] = set()

    @property
    def has_news(self) -> bool:
        """True if AIGW's load has changed since the last message about it."""
        return self._loads.has_changed or bool(self._renamed)

    def publish(self, update: Update, message: bytes, now_s: float) -> None:
        """Take in what a member says, and pass it on.

        Args:
            update: Of any age.
            message: Its bytes as they came, so that followers get fields that this version does not know.
            now_s: Monotonic seconds.

        Raises:
            MessageError: It claims to come from this service.
        """
        self._refuse_namesake(update)
        self.advance(now_s)
        self.shares.apply(update, now_s)
        self._learn(row.endpoint for row in update.rows)
        self._messages.append(message)

    def reserve(self, update: Update, reservations: Sequence[Reservation], now_s: float) -> list[Reserved]:
        """Take in what a member says, give its requests places, and pass on the rows as charged.

        Raises:
            CapacityError: Too many members or rows; no follower gets anything.
            MessageError: It claims to come from this service.
        """
        self._refuse_namesake(update)
        self.advance(now_s)
        wanted = {candidate.endpoint for asked in reservations for candidate in asked.candidates}
        others = {endpoint: self._row(endpoint).requests for endpoint in wanted}
        places, charged = reserve(self.shares, update, reservations, others, now_s)
        self._learn(wanted)
        self._learn(row.endpoint for row in update.rows)
        self._messages.append(encode(charged))
        return places

    def snapshot(self, now_s: float) -> list[Update]:
        """Updates that give a newcomer all live shares."""
        self.advance(now_s)
        updates = self.shares.shares(now_s)
        if self._loads.addresses:
            self.add_changes()
            updates.append(self._full())
        return updates

    def load_of(self, cluster: str, now_s: float) -> list[EngineLoad] | None:
        """Load per engine of a cluster, members' included; None if there is none (Rules 3, 4)."""
        self.advance(now_s)
        engines = {engine.address: engine for engine in self._loads.view(cluster, now_s) or ()}
        for endpoint, amounts in self.shares.totals.items():
            address = endpoint if endpoint in engines else _host(endpoint)
            engine = engines.get(address) or EngineLoad(address, 0, NOTHING, now_s)
            engines[address] = engine.plus(amounts, now_s)
        return list(engines.values()) or None

    def add_changes(self) -> None:
        """Add a message of what has changed of AIGW's load."""
        changed = self._loads.take_changed() | self._renamed
        self._renamed.clear()
        endpoints = {endpoint for address in changed for endpoint in self._endpoints_at(address)}
        if endpoints:
            self._sequence += 1
            rows = tuple(self._row(endpoint) for endpoint in islice(endpoints, MAX_ENDPOINTS))
            self._messages.append(encode(Update(self._member, self._sequence, rows, lease_s=AIGW_LEASE_S)))

    def renew(self, now_s: float) -> None:
        """Add a message of all of AIGW's load, if there is any; called several times per `AIGW_LEASE_S`."""
        self.advance(now_s)
        self.add_changes()
        if self._loads.addresses:
            self._sequence += 1
            self._messages.append(encode(self._full()))

    def take_messages(self) -> list[bytes]:
        """The messages for followers, in order; each once."""
        messages, self._messages = self._messages, []
        return messages

    def advance(self, now_s: float) -> None:
        """End requests of AIGW and shares of members that are due by `now_s`; O(1) when none is."""
        self._loads.advance(now_s)
        self.shares.advance(now_s)

    def _full(self) -> Update:
        endpoints = {
            endpoint for address in self._loads.addresses for endpoint in self._endpoints_at(address)
        }
        rows = tuple(self._row(endpoint) for endpoint in islice(endpoints, MAX_ENDPOINTS))
        return Update(self._member, self._sequence, rows, full=True, lease_s=AIGW_LEASE_S)

    def _row(self, endpoint: EndpointKey) -> Row:
        """What AIGW's gateways have in flight on an endpoint: under its name, and under its host's."""
        loads = [self._loads.at(name).amounts for name in {endpoint, _host(endpoint)}]
        return Row(endpoint, *least(_MOST, reduce(sum_of, loads)))

    def _endpoints_at(self, address: str) -> Iterable[EndpointKey]:
        return (EndpointKey(address),) if _host(address) != address else self._hosts.get(address, ())

    def _learn(self, endpoints: Iterable[EndpointKey]) -> None:
        for endpoint in endpoints:
            if endpoint in self._endpoints:
                self._endpoints.move_to_end(endpoint)
                continue
            host = self._endpoints[endpoint] = _host(endpoint)
            self._hosts.setdefault(host, set()).add(endpoint)
            if host in self._loads.addresses:
                self._renamed.add(host)
            if len(self._endpoints) > MAX_ENDPOINTS:
                forgotten, host = self._endpoints.popitem(last=False)
                self._hosts[host].discard(forgotten)
                if not self._hosts[host]:
                    del self._hosts[host]

    def _refuse_namesake(self, update: Update) -> None:
        if gateway_of(update.member) == AIGW:
            raise MessageError(f"no gateway may be called {AIGW}")


@lru_cache(maxsize=2 * MAX_ENDPOINTS)
def _host(name: str) -> str:
    """Of a name that is an address, the host; any other name as it is."""
    try:
        return Address.parse(name).host
    except ValueError:
        return name
