"""The compiled configuration: what the request line decides, and which endpoints a route may use."""

from __future__ import annotations

import random
from collections.abc import Sequence

import orjson
import pytest
from hypothesis import given
from hypothesis import strategies as st

from extproc.choosing.lines import OtherLines
from extproc.errors import Reason, RouterError
from extproc.health.settings import HealthSettings
from extproc.health.tracker import HealthTracker
from extproc.request.rules import ModelRules, Rule, RuleTable
from extproc.routing.pools import RECOUNT_S, Pools
from extproc.routing.table import Retrieve, RoutingTable
from extproc.values.endpoints import Endpoint
from extproc.values.exchange import (
    NEED_BODY,
    NEED_BODY_AND_HEAD,
    AnswerAtOnce,
    LineVerdict,
    PassTo,
    RefuseAtOnce,
    RequestHeaders,
)
from extproc.values.placements import Plan
from metadata_center.errors import CapacityError
from metadata_center.types import EndpointKey
from tests.conftest import CLUSTER, endpoint

MODELS = ("m", "org/m")
INFERENCE = ("chat/completions", "completions", "responses", "messages", "embeddings")


def slots_of(keys: Sequence[EndpointKey]) -> tuple[int, ...]:
    """The number that `endpoint` was given is the slot."""
    return tuple(int(key.removeprefix("uid/")) for key in keys)


def table(endpoints: Sequence[Endpoint] = (), default_cluster: str | None = None) -> RoutingTable:
    """A table over one cluster."""
    rules = RuleTable([ModelRules(name, (Rule(CLUSTER),)) for name in MODELS])
    return RoutingTable(
        rules,
        {CLUSTER: endpoints, "other": ()},
        MODELS,
        default_cluster,
        frozenset(),
        slots_of,
        loaded_unix_s=1.7e9,
    )


def test_an_endpoint_that_cannot_be_counted_is_left_out() -> None:
    """The others serve; when there is room again, so does it."""
    room = {"uid/1", "uid/3"}
    asked: list[EndpointKey] = []

    def few(keys: Sequence[EndpointKey]) -> tuple[int, ...]:
        asked.extend(keys)
        if not room.issuperset(keys):
            raise CapacityError("no room")
        return slots_of(keys)

    rules = RuleTable([ModelRules("m", (Rule(CLUSTER),))])
    endpoints = [endpoint(number) for number in (1, 2, 3)]
    one = RoutingTable(rules, {CLUSTER: endpoints}, ["m"], None, frozenset(), few, loaded_unix_s=0.0)
    pool = one.pool(CLUSTER, {}, lambda _key: None)
    assert (pool.keys, pool.slots) == (("uid/1", "uid/3"), (1, 3))
    assert pool.filtered == (("uid/2", "no slot"),)
    health = HealthTracker(HealthSettings())
    health.update({each.key: [each] for each in endpoints})
    pools = Pools(health, OtherLines())
    route = one.rules.match("m", {}, random.Random(1))
    lacking = pools.of_route(route, one, 1.0)
    assert lacking.slots == (1, 3)
    asked.clear()
    assert pools.of_route(route, one, 1.0 + 0.9 * RECOUNT_S) is lacking, "it is not made for each request"
    assert not asked
    again = pools.of_model(route, one, "m", 1.0 + 1.01 * RECOUNT_S)
    assert again.slots == (1, 3)
    assert again is not lacking
    room.add("uid/2")
    assert one.pool(CLUSTER, {}, lambda _key: None).slots == (1, 2, 3)
    assert pools.of_route(route, one, 1.0 + 1.9 * RECOUNT_S) is again
    whole = pools.of_route(route, one, 1.0 + 2.1 * RECOUNT_S)
    assert whole.slots == (1, 2, 3), "the pool that lacked one is asked for no longer"
    assert pools.of_route(route, one, 1.0 + 9.0 * RECOUNT_S) is whole


def judge(path: str, method: str = "GET", default_cluster: str | None = None) -> LineVerdict:
    """The verdict on a request line."""
    return table(default_cluster=default_cluster).judge(RequestHeaders(method, path, {}, end_of_stream=True))


@pytest.mark.parametrize("name", INFERENCE)
@pytest.mark.parametrize("suffix", ["", "/", "?api-version=1", "/?x=//[y"])
def test_inference_needs_its_body(name: str, suffix: str) -> None:
    """Every inference path waits for the body, with or without a query or a trailing slash."""
    wanted = NEED_BODY_AND_HEAD if name == "responses" else NEED_BODY
    assert judge(f"/v1/{name}{suffix}", "POST") is wanted


@pytest.mark.parametrize("method", ["GET", "PUT", "DELETE", ""])
def test_inference_takes_post_alone(method: str) -> None:
    """Another method is refused with 405 before any body is sent."""
    verdict = judge("/v1/chat/completions", method, default_cluster="other")
    assert isinstance(verdict, RefuseAtOnce)
    assert (verdict.error.reason, verdict.error.status) == (Reason.METHOD_NOT_ALLOWED, 405)
    assert verdict.error.allow == ("POST",)


@pytest.mark.parametrize("path", ["/v1/models", "/v1/models/", "/v1/models?limit=2"])
def test_the_models_are_listed(path: str) -> None:
    """The list names every model in OpenAI's form, without asking an engine."""
    verdict = judge(path, default_cluster="other")
    assert isinstance(verdict, AnswerAtOnce)
    assert verdict.status == 200
    listed = orjson.loads(verdict.body)
    assert listed["object"] == "list"
    assert [model["id"] for model in listed["data"]] == list(MODELS)
    assert listed["data"][0] == {
        "id": "m",
        "object": "model",
        "created": 1_700_000_000,
        "owned_by": "tokenway",
    }


@pytest.mark.parametrize("path", ["/v1/models", "/v1/models/m"])
def test_the_models_are_read_alone(path: str) -> None:
    """HEAD, which load balancers probe with, is answered as GET is; others are told what there is."""
    assert judge(path, "HEAD") == judge(path)
    verdict = judge(path, "POST")
    assert isinstance(verdict, RefuseAtOnce)
    assert (verdict.error.reason, verdict.error.status) == (Reason.METHOD_NOT_ALLOWED, 405)
    assert verdict.error.allow == ("GET", "HEAD")
    assert isinstance(judge(path, "POST", default_cluster="other"), PassTo)


@pytest.mark.parametrize("path", ["org/m", "org%2Fm", "org%2fm?x=1"])
def test_a_model_is_found_by_its_name(path: str) -> None:
    """A slash in a name may come as it is or, as OpenAI's client sends it, percent-encoded."""
    verdict = judge(f"/v1/models/{path}")
    assert isinstance(verdict, AnswerAtOnce)
    assert orjson.loads(verdict.body)["id"] == "org/m"


@pytest.mark.parametrize(("tenant", "names"), [(None, ["m", "alias"]), ("b", ["m", "alias"]), ("a", None)])
def test_a_model_of_others_is_not_listed(tenant: str | None, names: list[str] | None) -> None:
    """One whose rules all want a header is listed to those that send it, under all its names."""
    everybody = ModelRules("m", (Rule(CLUSTER), Rule("other", headers={"x-tenant": "a"})), aliases=("alias",))
    ours = ModelRules("a/secret", (Rule(CLUSTER, headers={"x-tenant": "a"}),), aliases=("a/alias",))
    all_names = ["m", "alias", "a/secret", "a/alias"]
    rules = RuleTable([everybody, ours])
    of_both = RoutingTable(rules, {CLUSTER: ()}, all_names, None, frozenset(), slots_of, loaded_unix_s=0.0)

    def asked(path: str) -> LineVerdict:
        headers = {} if tenant is None else {"x-tenant": tenant}
        return of_both.judge(RequestHeaders("GET", path, headers, end_of_stream=True))

    listed = asked("/v1/models")
    assert isinstance(listed, AnswerAtOnce)
    names = all_names if names is None else names
    assert [model["id"] for model in orjson.loads(listed.body)["data"]] == names
    for name in all_names:
        verdict = asked(f"/v1/models/{name}")
        assert isinstance(verdict, AnswerAtOnce if name in names else RefuseAtOnce)
        if isinstance(verdict, RefuseAtOnce):
            assert verdict.error.reason is Reason.MODEL_NOT_FOUND
            unknown = asked("/v1/models/nope")
            assert isinstance(unknown, RefuseAtOnce)
            assert str(verdict.error) == str(unknown.error)


def test_a_model_that_is_not_served_is_not_found() -> None:
    """An unknown name is 404, even where other paths are passed on."""
    verdict = judge("/v1/models/x", default_cluster="other")
    assert isinstance(verdict, RefuseAtOnce)
    assert (verdict.error.reason, verdict.error.status) == (Reason.MODEL_NOT_FOUND, 404)


@pytest.mark.parametrize("path", ["/", "/health", "/v1/audio/speech", "/v1/chat/completions/x", "/v2/models"])
@pytest.mark.parametrize("method", ["GET", "POST"])
def test_other_paths_go_to_the_default_cluster_or_nowhere(path: str, method: str) -> None:
    """What is no inference is passed on where a default cluster is configured, else refused."""
    assert judge(path, method, default_cluster="other") == PassTo(Plan("other"))
    verdict = judge(path, method)
    assert isinstance(verdict, RefuseAtOnce)
    assert verdict.error.reason is Reason.UNKNOWN_PATH


@given(path=st.text(alphabet="/[]:@?#%v1models\x00é", max_size=12), method=st.sampled_from(["GET", "POST"]))
def test_every_path_has_a_verdict(path: str, method: str) -> None:
    """No path a client can think of raises: `//[x` is no valid URL, but a path like any other."""
    assert isinstance(judge(path, method), LineVerdict)
    assert isinstance(judge("//[" + path, method, default_cluster="other"), LineVerdict)


@pytest.mark.parametrize(
    "path",
    [
        "/v1/chat/completion%73",
        "/%76%31/chat/completions?x=%2F",
        "/v1%2Fchat%2fcompletions",
        "/v1/chat/completions%2F",
    ],
)
def test_a_path_is_read_as_engines_read_it(path: str) -> None:
    """Percent-encoded letters and slashes are what they stand for, once."""
    assert judge(path, "POST", default_cluster="other") == NEED_BODY
    refused = judge(path, "GET", default_cluster="other")
    assert isinstance(refused, RefuseAtOnce)
    assert refused.error.reason is Reason.METHOD_NOT_ALLOWED


@pytest.mark.parametrize(
    "path",
    [
        "/v1/chat/completion%2573",
        "/v1/chat/completion%25252573",
        "//v1//chat/completions",
        "/v1/./chat/x/../completions",
        "/v1/%2e%2e/v1/chat/completions",
        "/V1/Chat/Completions",
        "/v1/chat/completions;a=1",
        "/v1;a/chat/completions",
        "/v1/chat/completions%20",
        "/v1/chat/completions%00",
        "/v1/chat/completions%",
        "/v1/chat/completions%3Fa",
        "/v1/chat/completions%23a",
        "/v1\\chat/completions",
        "/v1/chat/completions//",
        "/" + "%25" * 9 + "73leep",
    ],
)
def test_another_spelling_of_inference_passes_to_no_engine(path: str) -> None:
    """What some engine or proxy might take for inference does not pass unread by the default cluster."""
    verdict = judge(path, "POST", default_cluster="other")
    assert isinstance(verdict, RefuseAtOnce)
    assert verdict.error.reason is Reason.UNKNOWN_PATH


@pytest.mark.parametrize("method", ["GET", "POST", "PUT", "DELETE"])
@pytest.mark.parametrize(
    "path",
    [
        "/sleep?level=2",
        "/%73leep",
        "/sleep/",
        "//sleep",
        "/x/../sleep",
        "/Sleep",
        "/sleep;x",
        "/sleep/now",
        "/%2573leep",
        "/v1/load_lora_adapter",
        "/metrics",
        "/metrics/",
        "/update_weights_from_somewhere",
        "/release_memory",
        "/_resource_governor/x",
        "/_internal/tokenize",
        "/fault_tolerance/apply",
        "/generate",
        "/invocations",
    ],
)
def test_engines_admin_paths_pass_to_no_engine(path: str, method: str) -> None:
    """However spelled and by any method, unless the operator names them."""
    verdict = judge(path, method, default_cluster="other")
    assert isinstance(verdict, RefuseAtOnce)
    assert verdict.error.reason is Reason.UNKNOWN_PATH


@pytest.mark.parametrize("method", ["GET", "HEAD", "POST", "DELETE"])
@pytest.mark.parametrize(
    "path",
    [
        "/v1/models/..%2f..%2fmetrics",
        "/v1/models/../../metrics",
        "/v1/models/%2e%2e/..%5cmetrics",
        "/v1/models/..%252f..%252fmetrics",
        "/v1/responses/..%2f..%2fmetrics",
        "/v1/responses/..%5C..%5cmetrics",
        "/v1/responses/..%2f..%2fsleep%3f/cancel",
        "/v1/responses/..%2fchat%2fcompletions%3f/input_items",
        "/v1/responses/..%252f..%252fmetrics",
        "/v1/models/x%3f/..%2f..%2f..%2fmetrics",
        "/v1/responses/x%23..%2f..%2f..%2f..%2fsleep/cancel",
    ],
)
def test_what_passes_by_a_name_is_no_other_path(path: str, method: str) -> None:
    """A gateway that is not ours may leave dots and escapes in it, which what is before an engine reads."""
    rules = RuleTable([ModelRules("*", (Rule("other"),))])
    of_any = RoutingTable(
        rules, {CLUSTER: (), "other": ()}, ("*",), "other", frozenset(), slots_of, loaded_unix_s=0.0
    )
    verdict = of_any.judge(RequestHeaders(method, path, {}, end_of_stream=True))
    assert isinstance(verdict, RefuseAtOnce)
    assert verdict.error.status in (404, 405)
    plain = of_any.judge(RequestHeaders("GET", "/v1/models/org%2Fname", {}, end_of_stream=True))
    assert plain == PassTo(Plan("other"))


def test_an_admin_path_that_is_named_passes_and_no_other() -> None:
    """The setting opens the path and what is below it."""
    rules = RuleTable([ModelRules("m", (Rule(CLUSTER),))])
    open_to = RoutingTable(
        rules,
        {CLUSTER: (), "other": ()},
        MODELS,
        "other",
        frozenset(),
        slots_of,
        1.7e9,
        frozenset({"/metrics"}),
    )

    def passes(path: str) -> bool:
        return isinstance(open_to.judge(RequestHeaders("GET", path, {}, end_of_stream=True)), PassTo)

    assert passes("/metrics")
    assert passes("/metrics/x")
    assert not passes("/metricsx/../sleep")
    assert not passes("/sleep")


STORED = {
    "/v1/responses/resp_1": ("GET", "DELETE"),
    "/v1/responses/resp_1/": ("GET", "DELETE"),
    "/v1/responses/resp_1?stream=true&starting_after=7": ("GET", "DELETE"),
    "/v1/responses/resp%5F1/cancel": ("POST",),
    "/v1/responses/resp_1/input_items?limit=2": ("GET",),
}


@pytest.mark.parametrize("path", STORED)
@pytest.mark.parametrize("method", ["GET", "DELETE", "POST", "PUT"])
def test_a_stored_response_goes_where_it_is_held(path: str, method: str) -> None:
    """By the methods its path takes; any other is 405, even where other paths are passed on."""
    verdict = judge(path, method, default_cluster="other")
    if method in STORED[path]:
        assert isinstance(verdict, Retrieve)
        assert verdict.named.response_id == "resp_1"
        assert verdict.named.stream is ("stream=true" in path)
    else:
        assert isinstance(verdict, RefuseAtOnce)
        assert verdict.error.status == 405


@pytest.mark.parametrize(
    "path",
    [
        "/v1/responses/" + "x" * 513,
        "/v1/responses//cancel",
        "/v1/responses/resp_1/tool_outputs",
        "/v1/responses/resp_1/cancel/x",
        "/v1/responsesx/resp_1",
    ],
)
def test_what_is_no_stored_response_is_like_any_other_path(path: str) -> None:
    """An id beyond all bounds, none at all, or an operation that none has."""
    assert judge(path, "GET", default_cluster="other") == PassTo(Plan("other"))
    assert isinstance(judge(path, "GET"), RefuseAtOnce)


def test_a_pool_holds_what_is_available_and_says_why_the_rest_is_not() -> None:
    """Rows come in configuration order, aligned with slots and weights; each absence has its reason."""
    gold = {"tier": "gold", "zone": "a"}
    endpoints = [
        endpoint(1, labels=gold, weight=3),
        endpoint(2, labels={"tier": "iron"}),
        endpoint(3, labels=gold),
        endpoint(4),
        endpoint(5, labels=gold),
    ]
    sick = {endpoint(3).key: "draining", endpoint(2).key: "asleep"}
    pool = table(endpoints).pool(CLUSTER, {"tier": "gold"}, sick.get)
    assert pool.keys == (endpoint(1).key, endpoint(5).key)
    assert pool.slots == (1, 5)
    assert pool.weights == (3.0, 1.0)
    assert pool.filtered == (
        (endpoint(2).key, "subset"),
        (endpoint(3).key, "draining"),
        (endpoint(4).key, "subset"),
    )


def test_an_unknown_cluster_is_empty() -> None:
    """A rule may name a cluster that has no endpoints yet."""
    pool = table([endpoint(1)]).pool("nowhere", {}, lambda _: None)
    assert (pool.keys, pool.filtered, len(pool.slots), len(pool.weights)) == ((), (), 0, 0)


def test_a_cluster_that_no_source_lists_is_waited_for() -> None:
    """Its requests get 503 and are to come again; once it is there they are judged as any."""
    built = table(default_cluster="later")
    with pytest.raises(RouterError) as caught:
        built.expect("later", "Model `m`", 1)
    assert (caught.value.reason, caught.value.status) == (Reason.CLUSTER_NOT_LISTED, 503)
    assert caught.value.retry_after_s == 1
    built.expect(CLUSTER, "Model `m`", 1)
