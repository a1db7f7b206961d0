"""The metadata-center API without sockets: what each call takes, answers and refuses."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import orjson
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from metadata_center.service.api import Api, openapi_document, openapi_json, route
from metadata_center.service.calls import TRACE_HEADER, ServiceRequest, ServiceResponse
from metadata_center.service.cluster_loads import Limits
from metadata_center.service.fields import MAX_HASHES, MAX_INT32, MAX_NAME_CHARS, canonical_address
from metadata_center.service.operator_calls import LogLevel
from metadata_center.service.state import ServiceState
from metadata_center.sharing.http_messages import (
    EVENTS_PATH,
    FRAMES_TYPE,
    KEEP_ALIVE,
    RESERVE_PATH,
    SHARES_PATH,
    Deframer,
    encode_reserve,
)
from metadata_center.sharing.messages import Candidate, Reservation, Row, Update, decode, encode, member_id
from metadata_center.types import EndpointKey
from tokenway.cli.main import _parser

ETC = Path(__file__).parents[3] / "etc"
STATS, PROMPT, EVENT = "/v1/load/stats", "/v1/load/prompt", "/v1/replica/event"
SAVE, QUERY, LEVEL = "/v1/cache/save", "/v1/cache/query", "/log/level"
REFRESH = "/v1/load/refresh"
TOKENS = ("input_tokens", "generated_tokens")
SHARE = Update(
    member_id("gw", 0, "a"), 1, (Row(EndpointKey("10.0.0.1:8000"), 2, 1, 30, 40, 5),), full=True, lease_s=5.0
)
ADD = {"request_id": "r", "cluster": "c", "ip": "10.0.0.1", "prompt_length": 512}
KEEP = {"cluster": "c", "prompt_hash": [1, 2, 3], "ip": "10.0.0.1"}
ASK = {"cluster": "c", "prompt_hash": [1, 2, 9]}
INVALID = 40001400
UNIX_NS = 1_700_000_000_000_000_000


class FakeHost:
    """A process that shows fixed metrics and remembers the level it was given."""

    level: LogLevel | None = None

    def metrics_text(self) -> bytes:
        """Some metrics."""
        return b"up 1\n"

    def set_log_level(self, level: LogLevel) -> None:
        """Remember."""
        self.level = level


class Client:
    """Calls an API of its own, at a time set by hand."""

    def __init__(self, limits: Limits | None = None, token: str | None = None) -> None:
        self.host = FakeHost()
        self.state = ServiceState(limits or Limits(), zero_unix_ns=UNIX_NS)
        self.api = Api(self.state, self.host, token=token)
        self.now_s = 0.0

    def call(self, method: str, path: str, body: object = b"", **fields: Any) -> ServiceResponse:
        """One call; a body that is not bytes is sent as JSON."""
        data = body if isinstance(body, bytes) else orjson.dumps(body)
        return self.api.answer(ServiceRequest(method, path, "t", body=data, **fields), self.now_s)

    def ok(self, method: str, path: str, body: object = b"", **fields: Any) -> Any:
        """The data of a call that must succeed, in exactly the documented envelope."""
        answer = self.call(method, path, body, **fields)
        envelope = orjson.loads(answer.body)
        assert (answer.status, envelope) == (
            200,
            {"status": "OK", "error": None, "data": envelope["data"], "trace_id": "t"},
        )
        return envelope["data"]

    def refused(self, method: str, path: str, body: object = b"", **fields: Any) -> tuple[int, str, str]:
        """Code, message and reason of a call that must fail, in exactly the documented envelope."""
        answer = self.call(method, path, body, **fields)
        envelope = orjson.loads(answer.body)
        error = envelope["error"]
        assert envelope == {"status": "ERROR", "error": error, "data": None, "trace_id": "t"}
        assert answer.status == error["code"] // 100_000
        return error["code"], error["message"], error["reason"]

    def load(self, cluster: str = "c") -> Any:
        """Queued requests and prompt length by address; None if the cluster is unknown."""
        data = self.ok("GET", STATS, query=f"cluster={cluster}")
        return data and {load["ip"]: (load["queued_req_num"], load["prompt_length"]) for load in data}


def without(body: dict[str, Any], name: str) -> dict[str, Any]:
    """A body without one field."""
    return {key: found for key, found in body.items() if key != name}


def test_a_request_through_its_life() -> None:
    """Added, prompt deleted, deleted: each call answers with no data and the load follows."""
    client = Client()
    assert client.load() is None
    assert client.ok("POST", STATS, {**ADD, "timestamp": 1_700_000_000_000_000_000}) is None
    assert client.load() == {"10.0.0.1": (1, 512)}
    assert client.ok("POST", STATS, ADD) is None
    assert client.load() == {"10.0.0.1": (1, 512)}
    for _ in range(2):
        assert client.ok("DELETE", PROMPT, {"request_id": "r"}) is None
        assert client.load() == {"10.0.0.1": (1, 0)}
    for _ in range(2):
        assert client.ok("DELETE", STATS, {"request_id": "r"}) is None
        assert client.load() == {"10.0.0.1": (0, 0)}


def test_the_load_of_an_engine_has_the_documented_shape() -> None:
    """`updated_time` is the Unix time of the last change in nanoseconds."""
    client = Client()
    client.now_s = 1.5
    client.ok("POST", STATS, ADD)
    client.now_s = 9.0
    assert client.ok("GET", STATS, query="cluster=c") == [
        {
            "ip": "10.0.0.1",
            "queued_req_num": 1,
            "prompt_length": 512,
            "prefill_req_num": 1,
            "prefill_tokens": 128,
            "input_tokens": 128,
            "generated_tokens": 0,
            "updated_time": UNIX_NS + 1_500_000_000,
        }
    ]


def tokens(client: Client) -> tuple[int, ...]:
    """Prefills, their tokens, input and generated tokens of the one engine there is."""
    (load,) = client.ok("GET", STATS, query="cluster=c")
    return tuple(load[name] for name in ("prefill_req_num", "prefill_tokens", *TOKENS))


def test_tokens_follow_what_callers_report() -> None:
    """With the add, with refreshes, and by a replica's event; without, AIGW's calls work as ever."""
    client = Client()
    client.ok("POST", STATS, {**ADD, "input_tokens": 100})
    assert tokens(client) == (1, 100, 100, 0)
    client.ok("POST", REFRESH, {"request_id": "r", "input_tokens": 90, "generated_tokens": 5})
    assert tokens(client) == (1, 90, 90, 5)
    client.ok("DELETE", PROMPT, {"request_id": "r"})
    client.ok("POST", EVENT, {"request_id": "r", "generated_tokens": 9}, event_type="load.stats.refresh")
    assert tokens(client) == (0, 0, 90, 9)
    client.ok("DELETE", STATS, {"request_id": "r"})
    assert tokens(client) == (0, 0, 0, 0)


def test_a_refresh_keeps_a_long_stream_counted() -> None:
    """Past its expiry; of a request that is not known it is no failure."""
    client = Client()
    client.ok("POST", STATS, ADD)
    for client.now_s in (600.0, 1_200.0):
        client.ok("POST", REFRESH, {"request_id": "r"})
    assert client.load() == {"10.0.0.1": (1, 512)}
    client.now_s = 1_900.0
    assert client.ok("POST", REFRESH, {"request_id": "r"}) is None
    assert client.load() is None


def frames(answer: ServiceResponse) -> list[Update]:
    """Updates of an answer."""
    deframer = Deframer()
    deframer.feed(answer.body)
    found = []
    while (message := deframer.take()) is not None:
        found.append(decode(message))
    assert deframer.is_empty
    return found


def test_a_share_is_published_read_and_passed_on() -> None:
    """It is in the snapshot, and followers get its bytes."""
    client = Client()
    assert client.ok("POST", SHARES_PATH, encode(SHARE)) is None
    answer = client.call("GET", SHARES_PATH)
    assert (answer.status, answer.headers["Content-Type"]) == (200, FRAMES_TYPE)
    assert frames(answer) == [SHARE]
    assert client.state.rendezvous.take_messages() == [encode(SHARE)]


def test_aigw_and_gateways_count_together() -> None:
    """A query shows both, a snapshot has AIGW's as one more member, a reservation knows of it."""
    client = Client()
    client.ok("POST", STATS, ADD)
    client.ok("POST", SHARES_PATH, encode(SHARE))
    assert client.load() == {"10.0.0.1": (3, 512 + 4 * 30)}
    _, theirs = frames(client.call("GET", SHARES_PATH))
    assert theirs.rows == (Row(SHARE.rows[0].endpoint, 1, 1, 128, 128),)
    asked = [Reservation((Candidate(SHARE.rows[0].endpoint, 3, 1, 1),))]
    body = encode_reserve(Update(SHARE.member, 2), asked)
    assert client.ok("POST", RESERVE_PATH, body) == [{"index": 0, "totals": [3]}]


@pytest.mark.parametrize("path", [SHARES_PATH, RESERVE_PATH])
@pytest.mark.parametrize("body", [b"", b"{}", b"\x00", b"\xff" * 40])
def test_bytes_that_are_no_message_are_invalid_input(path: str, body: bytes) -> None:
    """And no follower gets them."""
    client = Client()
    assert client.refused("POST", path, body)[0] == INVALID
    assert client.state.rendezvous.take_messages() == []


def test_an_answer_that_follows_begins_with_a_keep_alive() -> None:
    """The rest is the server's."""
    answer = Client().call("GET", EVENTS_PATH)
    assert (answer.status, answer.follows, answer.body) == (200, True, KEEP_ALIVE)


def test_the_bodies_of_aigw_are_understood() -> None:
    """Its deletes carry an empty cluster and ip, its queries say topk."""
    client = Client()
    client.ok("POST", STATS, {**ADD, "timestamp": 7})
    client.ok("DELETE", PROMPT, {"request_id": "r", "cluster": "", "ip": ""})
    client.ok("DELETE", STATS, {"request_id": "r", "cluster": "", "ip": ""})
    assert client.load() == {"10.0.0.1": (0, 0)}
    for host in range(20):
        client.ok("POST", SAVE, {**KEEP, "ip": f"10.0.0.{host}"})
    assert len(client.ok("POST", QUERY, {**ASK, "topk": 10})["locations"]) == 10


@pytest.mark.parametrize(
    ("fields", "count"),
    [({}, 5), ({"top_k": 0}, 5), ({"top_k": 2}, 2), ({"topk": 7}, 7), ({"top_k": 3, "topk": 7}, 3)],
)
def test_a_query_names_the_top_k(fields: dict[str, int], count: int) -> None:
    """Either spelling counts, top_k first; 0 and nothing mean five."""
    client = Client()
    for host in range(9):
        client.ok("POST", SAVE, {**KEEP, "ip": f"10.0.0.{host}"})
    assert len(client.ok("POST", QUERY, {**ASK, **fields})["locations"]) == count


def test_a_query_answers_in_hashes() -> None:
    """AIGW divides `length` by the number of hashes it asked for; unknown clusters have no locations."""
    client = Client()
    client.ok("POST", SAVE, KEEP)
    assert client.ok("POST", QUERY, ASK) == {"locations": [{"ip": "10.0.0.1", "length": 2}]}
    assert client.ok("POST", QUERY, {**ASK, "cluster": "d"}) == {"locations": []}
    assert client.ok("POST", QUERY, {**ASK, "prompt_hash": []}) == {"locations": []}


def test_hashes_are_unsigned_64_bit() -> None:
    """The largest is exact."""
    client = Client()
    client.ok("POST", SAVE, {**KEEP, "prompt_hash": [2**64 - 1]})
    assert client.ok("POST", QUERY, {**ASK, "prompt_hash": [2**64 - 1]})["locations"]
    assert not client.ok("POST", QUERY, {**ASK, "prompt_hash": [2**64 - 2]})["locations"]


def test_an_integer_may_be_written_as_a_float() -> None:
    """12.0 is 12, in counts and in hashes, as JSON Schema has it."""
    client = Client()
    client.ok("POST", SAVE, {**KEEP, "prompt_hash": [12, 2.0]})
    asked = {**ASK, "prompt_hash": [12.0, 2], "top_k": 3.0}
    assert client.ok("POST", QUERY, asked) == {"locations": [{"ip": "10.0.0.1", "length": 2}]}


def test_lengths_stay_readable_to_aigw() -> None:
    """A sum beyond int32 is cut off there, and comes back exactly when requests end."""
    client = Client()
    client.ok("POST", STATS, {**ADD, "prompt_length": MAX_INT32})
    client.ok("POST", STATS, {**ADD, "request_id": "s", "prompt_length": MAX_INT32})
    assert client.load() == {"10.0.0.1": (2, MAX_INT32)}
    client.ok("DELETE", STATS, {"request_id": "r"})
    client.ok("POST", STATS, {**ADD, "request_id": "t", "prompt_length": 0})
    client.ok("DELETE", PROMPT, {"request_id": "s"})
    assert client.load() == {"10.0.0.1": (2, 0)}


def test_prompt_length_may_be_left_out() -> None:
    """It is 0 then: Go leaves out zeros."""
    client = Client()
    client.ok("POST", STATS, without(ADD, "prompt_length"))
    assert client.load() == {"10.0.0.1": (1, 0)}


@pytest.mark.parametrize(
    ("sent", "kept"),
    [
        ("10.0.0.1", "10.0.0.1"),
        ("10.0.0.1:8000", "10.0.0.1:8000"),
        ("10.0.0.1:08000", "10.0.0.1:8000"),
        ("fd00::1", "fd00::1"),
        ("FD00:0:0::1", "fd00::1"),
        ("[fd00:0::1]:8000", "[fd00::1]:8000"),
    ],
)
def test_an_engine_has_one_spelling(sent: str, kept: str) -> None:
    """IPv4 and IPv6, with a port or without: spellings of one address are one engine."""
    client = Client()
    client.ok("POST", STATS, {**ADD, "ip": sent})
    client.ok("POST", STATS, {**ADD, "request_id": "s", "ip": kept})
    assert client.load() == {kept: (2, 1024)}


@pytest.mark.parametrize(
    "text",
    [
        *("x", "10.0.0", "10.0.0.1:", "10.0.0.1:0", "10.0.0.1:65536", "10.0.0.1:-1", "10.0.0.1:8x", ":80"),
        *("10.0.0.1/8", "10.0.0.01", "[fd00::1]", "fe80::1%eth0", "[fe80::1%1]:80", "[]:80", "::1" * 30),
        *("", 17, None),
    ],
)
def test_what_is_no_address_is_refused(text: object) -> None:
    """Names, zones, networks and ports out of range are no engine."""
    with pytest.raises(ValueError):
        canonical_address(text)


REQUIRED = [
    *((("POST", STATS), ADD, name) for name in ("request_id", "cluster", "ip")),
    (("DELETE", STATS), {"request_id": "r"}, "request_id"),
    (("DELETE", PROMPT), {"request_id": "r"}, "request_id"),
    *((("POST", SAVE), KEEP, name) for name in ("cluster", "prompt_hash", "ip")),
    *((("POST", QUERY), ASK, name) for name in ("cluster", "prompt_hash")),
    (("POST", LEVEL), {"LevelParam": "INFO"}, "LevelParam"),
    (("POST", REFRESH), {"request_id": "r"}, "request_id"),
]


@pytest.mark.parametrize(("call", "body", "name"), REQUIRED)
def test_a_required_field_is_required(call: tuple[str, str], body: dict[str, Any], name: str) -> None:
    """Left out, null and of another type are all invalid input, and the message names the field."""
    expected = f"field {name} is required"
    for sent in (without(body, name), {**body, name: None}):
        assert Client().refused(*call, sent) == (INVALID, f"Invalid input parameters: {expected}", expected)
    code, message, _ = Client().refused(*call, {**body, name: {"a": 1}})
    assert code == INVALID
    assert f"field {name} should" in message


@pytest.mark.parametrize(
    ("call", "body"),
    [
        (("POST", STATS), {**ADD, "request_id": ""}),
        (("POST", STATS), {**ADD, "request_id": 7}),
        (("POST", STATS), {**ADD, "request_id": "r" * (MAX_NAME_CHARS + 1)}),
        (("POST", STATS), {**ADD, "cluster": "c" * (MAX_NAME_CHARS + 1)}),
        (("POST", STATS), {**ADD, "ip": "localhost"}),
        (("POST", STATS), {**ADD, "prompt_length": -1}),
        (("POST", STATS), {**ADD, "prompt_length": 1.5}),
        (("POST", STATS), {**ADD, "prompt_length": True}),
        (("POST", STATS), {**ADD, "prompt_length": "512"}),
        (("POST", STATS), {**ADD, "prompt_length": MAX_INT32 + 1}),
        (("POST", STATS), {**ADD, "input_tokens": -1}),
        (("POST", STATS), {**ADD, "input_tokens": None}),
        (("POST", REFRESH), {"request_id": "r", "generated_tokens": 0.5}),
        (("POST", REFRESH), {"request_id": "r", "input_tokens": "1"}),
        (("POST", SAVE), {**KEEP, "prompt_hash": "1"}),
        (("POST", SAVE), {**KEEP, "prompt_hash": [1, -1]}),
        (("POST", SAVE), {**KEEP, "prompt_hash": [1, True]}),
        (("POST", SAVE), {**KEEP, "prompt_hash": [1.5]}),
        (("POST", SAVE), {**KEEP, "prompt_hash": [0] * (MAX_HASHES + 1)}),
        (("POST", SAVE), b'{"cluster":"c","ip":"10.0.0.1","prompt_hash":[18446744073709551616]}'),
        (("POST", SAVE), b'{"cluster":"c","ip":"10.0.0.1","prompt_hash":[1e999]}'),
        (("POST", QUERY), {**ASK, "top_k": -1}),
        (("POST", QUERY), {**ASK, "topk": "10"}),
        (("POST", LEVEL), {"LevelParam": "debug"}),
        (("POST", STATS), [ADD]),
        (("POST", STATS), b"null"),
    ],
)
def test_a_field_that_will_not_do_is_invalid_input(call: tuple[str, str], body: object) -> None:
    """It is the documented 40001400, and nothing changes."""
    client = Client()
    code, message, reason = client.refused(*call, body)
    assert code == INVALID
    assert message.startswith("Invalid input parameters")
    assert reason
    assert client.load() is None


def test_the_longest_names_and_lists_are_taken() -> None:
    """The bounds themselves are within."""
    client = Client()
    name = "é" * MAX_NAME_CHARS
    client.ok("POST", STATS, {**ADD, "request_id": name, "cluster": name})
    assert client.load(name) == {"10.0.0.1": (1, 512)}
    client.ok("POST", SAVE, {**KEEP, "prompt_hash": list(range(MAX_HASHES))})


@pytest.mark.parametrize("body", [b"", b"i", b"{", b'{"a":1}x', b"\xff", b'"\\ud800"', b"[" * 5_000])
def test_a_body_that_is_no_json_is_invalid_input(body: bytes) -> None:
    """The message is the documented one, whatever is wrong with it."""
    code, message, reason = Client().refused("DELETE", STATS, body)
    assert (code, message) == (INVALID, "Invalid input parameters: invalid JSON format")
    assert reason


@pytest.mark.parametrize(
    "query", ["", "cluster=", "other=c", "cluster=%ff", f"cluster={'c' * 300}", "&".join(["a=b"] * 20)]
)
def test_a_load_query_needs_its_cluster(query: str) -> None:
    """Without one, or with one that cannot be decoded, it is invalid input."""
    assert Client().refused("GET", STATS, query=query)[0] == INVALID


def test_a_cluster_may_have_any_name() -> None:
    """Percent-encoding and plus signs are undone: Istio's names have bars."""
    client = Client()
    client.ok("POST", STATS, {**ADD, "cluster": "outbound|10001||qwen 3"})
    assert client.load("outbound%7C10001%7C%7Cqwen+3") == {"10.0.0.1": (1, 512)}


def test_an_unknown_path_is_404_and_a_wrong_method_405() -> None:
    """Codes follow the documented rule; 405 says what is allowed."""
    client = Client()
    assert client.refused("GET", "/v1/load")[0] == 40401400
    assert client.refused("PATCH", STATS)[0] == 40501400
    assert client.call("PATCH", STATS).headers["Allow"] == "GET, POST, DELETE"


def test_what_exceeds_the_bounds_is_429() -> None:
    """Too many requests or engines are the caller's to slow down about; known ones go on."""
    client = Client(Limits(max_requests=1, max_endpoints=1))
    client.ok("POST", STATS, ADD)
    client.ok("POST", SAVE, KEEP)
    assert client.refused("POST", STATS, {**ADD, "request_id": "s"})[0] == 42901400
    assert client.refused("POST", SAVE, {**KEEP, "ip": "10.0.0.2"})[0] == 42901400
    client.ok("POST", STATS, ADD)


@pytest.mark.parametrize(
    ("event", "body", "load"),
    [
        ("load.stats.set", {**ADD, "request_id": "s"}, (2, 1024)),
        ("load.stats.delete", {"request_id": "r"}, (0, 0)),
        ("load.prompt.delete", {"request_id": "r"}, (1, 0)),
    ],
)
def test_replicated_changes_are_changes(event: str, body: object, load: tuple[int, int]) -> None:
    """A replica of AIGW's metadata center can pass on what it received."""
    client = Client()
    client.ok("POST", STATS, ADD)
    client.ok("POST", EVENT, body, event_type=event)
    assert client.load() == {"10.0.0.1": load}


@pytest.mark.parametrize(
    ("event", "body", "reason"),
    [
        (None, {}, "missing Event-Type header"),
        ("unknown.event", {}, "Unsupported event type"),
        ("load.stats.set", {}, "handler execute error"),
        ("load.stats.delete", b"i", "handler execute error"),
    ],
)
def test_replicated_changes_that_are_none(event: str | None, body: object, reason: str) -> None:
    """They are refused with the reasons of AIGW's receiver."""
    code, _, found = Client().refused("POST", EVENT, body, event_type=event)
    assert code == INVALID
    assert reason in found


@pytest.mark.parametrize(
    "authorization",
    [None, "", "Bearer", "Bearer ", "Bearer wrong", "Basic secret", "secret", "Bearer sécret"],
)
def test_a_missing_or_wrong_token_is_401(authorization: str | None) -> None:
    """With the documented code, before anything of the call is looked at, unknown paths included."""
    client = Client(token="secret")
    for path in (STATS, "/openapi.json", "/nothing"):
        assert client.refused("GET", path, authorization=authorization)[0] == 40101001
    answer = client.call("GET", STATS, authorization=authorization)
    assert answer.headers["WWW-Authenticate"] == "Bearer"


def test_the_token_opens_and_probes_need_none() -> None:
    """The scheme's case does not matter; health and metrics are open."""
    client = Client(token="secret")
    for authorization in ("Bearer secret", "bearer  secret"):
        assert client.ok("GET", STATS, query="cluster=c", authorization=authorization) is None
    assert client.ok("GET", "/healthz") is None
    assert client.call("GET", "/metrics").status == 200


def test_the_log_level_is_passed_on() -> None:
    """By its name, in upper case."""
    client = Client()
    assert client.ok("POST", LEVEL, {"LevelParam": "DEBUG"}) == "log level updated successfully"
    assert client.host.level is LogLevel.DEBUG
    reason = "log LevelParam can only be [TRACE DEBUG INFO WARN ERROR FATAL]"
    assert client.refused("POST", LEVEL, {"LevelParam": "LOUD"})[2] == reason


def test_metrics_are_text_and_up_to_date() -> None:
    """They are the host's, after what is due has expired."""
    client = Client()
    client.ok("POST", STATS, ADD)
    client.now_s = 10_000.0
    answer = client.call("GET", "/metrics")
    assert (answer.status, answer.body) == (200, b"up 1\n")
    assert answer.headers["Content-Type"].startswith("text/plain; version=0.0.4")
    assert client.state.loads.in_flight == 0


def test_every_answer_carries_the_trace_id() -> None:
    """In the header, whatever the outcome."""
    client = Client()
    for method, path in (("GET", STATS), ("GET", "/metrics"), ("GET", "/openapi.json"), ("PUT", "/x")):
        assert client.call(method, path).headers[TRACE_HEADER] == "t"


def test_the_kept_openapi_document_is_current() -> None:
    """etc/metadata-center.openapi.json is what the code generates and the service answers."""
    assert (ETC / "metadata-center.openapi.json").read_bytes() == openapi_json()
    assert Client().call("GET", "/openapi.json").body == openapi_json()


def test_the_document_and_the_api_have_the_same_calls() -> None:
    """Every documented call is handled, every handled one documented, and metrics know them."""
    documented = {
        (method.upper(), path) for path, methods in openapi_document()["paths"].items() for method in methods
    }
    assert documented == set(Client().api._handlers)
    assert {route(*call) for call in documented} == documented


def test_what_a_caller_makes_up_is_no_label() -> None:
    """Unknown methods and paths share one."""
    assert route("BREW", "/coffee") == ("other", "other")
    assert route("BREW", STATS) == ("other", STATS)


def test_the_command_line_has_the_defaults_of_the_service() -> None:
    """`tokenway metadata-center` repeats them, so as not to load the service for its help."""
    options, limits = _parser().parse_args(["metadata-center"]), Limits()
    assert (options.request_expiry_s, options.cache_expiry_s, options.listen, options.token_env) == (
        limits.request_expiry_s,
        limits.cache_expiry_s,
        "127.0.0.1:8080",
        None,
    )


json_values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**63), 2**64 - 1)
    | st.floats(allow_nan=False)
    | st.text(max_size=9),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=5,
)
bodies = (
    st.binary(max_size=40)
    | json_values.map(orjson.dumps)
    | st.fixed_dictionaries(
        {},
        optional={
            name: json_values | st.sampled_from(["c", "10.0.0.1", "[::1]:80", [1, 2]])
            for name in ("request_id", "cluster", "ip", "prompt_length", "prompt_hash", "top_k", "LevelParam")
        },
    ).map(orjson.dumps)
)


@given(
    call=st.sampled_from(sorted(Client().api._handlers))
    | st.tuples(st.text(max_size=5), st.text(max_size=9)),
    body=bodies,
    query=st.text(max_size=20) | st.just("cluster=c"),
    event=st.none() | st.sampled_from(["load.stats.set", "load.stats.delete", "x"]),
)
@settings(max_examples=400)
def test_nothing_a_caller_sends_is_our_fault(
    call: tuple[str, str], body: bytes, query: str, event: str | None
) -> None:
    """No input raises or is answered with a 5xx."""
    answer = Client().call(*call, body, query=query, event_type=event)
    assert answer.status in (200, 400, 404, 405)
