"""What one decision costs in process: from a request's bytes to a charged endpoint.

    python -m benchmarks.decision

No network and no Envoy; parse, rules, blocks, prefix match, choice, prediction, charge, record and metrics
are in. Every request is released again, as its access-log entry would, but that is not timed.
"""

from __future__ import annotations

import json
import os
import platform
import random
import statistics
import time

from prometheus_client import CollectorRegistry

from extproc.discovery.fleet import Fleet
from extproc.discovery.listed import Listed
from extproc.health.settings import HealthSettings
from extproc.health.tracker import HealthTracker
from extproc.observing.metrics.collector import Metrics
from extproc.observing.records import RecordRing
from extproc.protocol.bootstrap_dialect import BootstrapDialect
from extproc.request.rules import ModelRules, Rule, RuleTable
from extproc.routing.caches import Caches
from extproc.routing.homes import Homes
from extproc.routing.router import Router
from extproc.routing.settings import RouterSettings
from extproc.routing.state import Outside, RoutingState, make_routing_state
from extproc.routing.table import RoutingTable
from extproc.values.balancing import Algorithm, LoadBalancing
from extproc.values.deciding import Now
from extproc.values.exchange import RequestHeaders
from metadata_center.addresses import Address
from metadata_center.history.prefix_index import PrefixIndex
from metadata_center.load.counters import Counters
from metadata_center.load.table import LoadTable
from metadata_center.types import RequestId


def routed(endpoints: int, algorithm: Algorithm, *, are_engines_known: bool) -> tuple[RoutingState, Router]:
    """A router over so many healthy endpoints of one cluster, and what it reads and writes."""
    fleet = Fleet()
    places = [Address(f"10.0.{i // 250}.{i % 250}", 8000) for i in range(endpoints)]
    fleet.replace("bench", {"c": [Listed(str(place), place) for place in places]})
    health = HealthTracker(HealthSettings())
    health.update({key: fleet.of(key) for key in fleet.keys})
    metrics = Metrics(CollectorRegistry(), "bench")
    metrics.configure(models=["m"], clusters=["c"], endpoints=fleet.keys)
    history = PrefixIndex(10_000, 100_000)
    state = make_routing_state(
        LoadTable(Counters()), Caches(history), health, RecordRing(2000), metrics, Homes(), Outside()
    )
    scheduling = state.scheduling
    table = RoutingTable(
        RuleTable([ModelRules("m", (Rule("c"),), load_balancing=LoadBalancing(algorithm=algorithm))]),
        fleet.clusters,
        ["m"],
        None,
        frozenset(),
        scheduling.load.slots,
        0.0,
    )
    router = Router(scheduling, table, RouterSettings(), random.Random(1), time.monotonic, time.time)
    for key in fleet.keys:  # known from the start, as after a minute of traffic
        history.record(key, [1])
        if are_engines_known:
            scheduling.engines.observe_kv_tokens(key, 500_000)
            scheduling.engines.configure(key, "alike", 256)
    return state, router


def decisions(
    endpoints: int,
    algorithm: Algorithm,
    *,
    prompt_bytes: int = 4096,
    repeats: int = 2000,
    are_engines_known: bool = False,
) -> float:
    """Median microseconds of one decision.

    Args:
        endpoints: Candidates, all healthy, in one cluster.
        algorithm: Which policy.
        prompt_bytes: Length of the prompt, to within one repetition of its words.
        repeats: Decisions timed; a quarter of them stay in flight.
        are_engines_known: Each engine's KV cache and most sequences are known.
    """
    state, router = routed(endpoints, algorithm, are_engines_known=are_engines_known)
    scheduling = state.scheduling
    dialect = BootstrapDialect("0.bench")
    took: list[float] = []
    for i in range(repeats):
        request_id = f"{i:036d}"
        headers = RequestHeaders(
            "POST",
            "/v1/chat/completions",
            {"x-tokenway-request-id": request_id, ":path": "/v1/chat/completions"},
            end_of_stream=False,
        )
        content = f"{i % 64:08d} " + "lorem ipsum " * (prompt_bytes // 12)
        body = b'{"model":"m","stream":true,"messages":[{"role":"user","content":"%s"}]}' % content.encode()
        began = time.perf_counter()
        deciding = router.decide(headers, body)
        assert isinstance(deciding, Now)
        dialect.decision(deciding.decision, to_trailers=False)
        took.append((time.perf_counter() - began) * 1e6)
        state.first_tokens.take(RequestId(request_id), time.monotonic(), late=False)
        if i % 4:  # a quarter stays in flight, so that loads differ
            scheduling.running.release(RequestId(request_id), time.monotonic())
            scheduling.running.finish(RequestId(request_id), time.monotonic(), completed=False)
    return statistics.median(took)


def main() -> None:
    """Print the figures; the last line is a JSON object."""
    print(f"{platform.machine()}, {os.cpu_count()} CPUs, Python {platform.python_version()}")
    figures = {}
    for algorithm in (Algorithm.INFERENCE_LB, Algorithm.LEAST_COMPLETION):
        for endpoints in (3, 10, 100, 1000):
            figures[f"{algorithm}_us_{endpoints}"] = round(decisions(endpoints, algorithm), 1)
    for endpoints in (3, 1000):
        took = decisions(endpoints, Algorithm.LEAST_COMPLETION, are_engines_known=True)
        figures[f"engines_known_us_{endpoints}"] = round(took, 1)
    print(json.dumps(figures))


if __name__ == "__main__":
    main()
