"""clusters.json: what it means, and what is said about mistakes."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from extproc.config.clusters import ClusterSpec, EndpointSpec, parse_clusters
from extproc.config.document import shown
from extproc.config.sections.fields import OWN_CLUSTERS
from extproc.errors import ConfigError
from metadata_center.load.counters import MAX_ENDPOINTS

ROOT = Path(__file__).parents[3]


def cluster(*endpoints: str, extra: str = "") -> str:
    """A file of one cluster whose endpoints begin at line 3, one per line."""
    lines = ",\n".join(endpoints)
    return f'{{"clusters": [\n{{"name": "a",{extra} "endpoints": [\n{lines}\n]}}]}}'


def problems(text: str) -> list[str]:
    """The problems of a file; none for a good one."""
    try:
        parse_clusters(text, "clusters.json")
    except ConfigError as error:
        return error.problems
    return []


def test_file_of_aigw_is_understood() -> None:
    """AIGW's format gives endpoints of weight 1 without labels."""
    one = '{"name":"a","endpoints":[{"address":"127.0.0.1","port":80}]}'
    assert parse_clusters(f'{{"clusters":[{one},{{"name":"b","endpoints":[]}}]}}', "x") == (
        ClusterSpec("a", (EndpointSpec("127.0.0.1", 80),)),
        ClusterSpec("b", ()),
    )


def test_optional_keys_arrive_and_cluster_labels_are_merged() -> None:
    """Endpoint labels win over the cluster's of the same name."""
    text = cluster(
        '{"address": "h", "port": 1, "weight": 5, "labels": {"x": "2"},'
        ' "metadata": {"rack": "9"}, "draining": true}',
        extra='"model": "m", "labels": {"x": "1", "y": "1"},',
    )
    (spec,) = parse_clusters(text, "x")
    assert spec.model == "m"
    assert spec.endpoints == (EndpointSpec("h", 1, 5, {"x": "2", "y": "1"}, {"rack": "9"}, draining=True),)


def test_a_limit_on_sequences_is_a_label() -> None:
    """The endpoint's goes before the cluster's, and both before a label of that name."""
    text = cluster(
        '{"address": "a", "port": 1}',
        '{"address": "b", "port": 1, "max_num_seqs": 64}',
        '{"address": "c", "port": 1, "labels": {"max_num_seqs": "32"}}',
        extra='"max_num_seqs": 128, "labels": {"max_num_seqs": "256"},',
    )
    (spec,) = parse_clusters(text, "x")
    assert [dict(endpoint.labels) for endpoint in spec.endpoints] == [
        {"max_num_seqs": number} for number in ("128", "64", "32")
    ]
    for wrong in ("0", "65537", '"128"', "1.5"):
        (problem,) = problems(cluster(f'{{"address": "h", "port": 1, "max_num_seqs": {wrong}}}'))
        assert problem.startswith("line 3: clusters[0].endpoints[0].max_num_seqs: ")
        assert problem.endswith("accepted: an integer from 1 to 65536")


@pytest.mark.parametrize(
    ("written", "address", "is_host_name"),
    [
        ("10.1.2.3", "10.1.2.3", False),
        ("2001:DB8:0::1", "2001:db8::1", False),
        ("::ffff:10.1.2.3", "10.1.2.3", False),
        ("0:0:0:0:0:FFFF:0a01:0203", "10.1.2.3", False),
        ("Vllm-0.vllm.svc.cluster.local.", "vllm-0.vllm.svc.cluster.local", True),
        ("my_engine", "my_engine", True),
    ],
)
def test_addresses_have_one_form(written: str, address: str, is_host_name: bool) -> None:
    """Addresses are brought to one spelling, and host names are distinguished from IPs."""
    (spec,) = parse_clusters(cluster(json.dumps({"address": written, "port": 1})), "x")
    assert (spec.endpoints[0].address, spec.endpoints[0].is_host_name) == (address, is_host_name)


@pytest.mark.parametrize(
    "address",
    [
        "",
        "10.0.0.300",
        "[::1]",
        "fe80::1%eth0",
        "a b",
        "http://x",
        "x:80",
        "-a",
        "a..b",
        "x.1",
        "0x7f000001",
        "a.0x",
        "a" * 64,
        "a." * 130,
    ],
)
def test_text_that_is_no_address_is_refused(address: str) -> None:
    """A mistyped IP, brackets, a zone, a URL or a port are errors that say what is accepted."""
    found = problems(cluster(json.dumps({"address": address, "port": 1})))
    expected = "accepted: IPv4, IPv6 without brackets and zone, or a host name"
    value = shown(address)
    assert found == [f"line 3: clusters[0].endpoints[0].address: not an address: {value}; {expected}"]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (
            cluster('{"address": "h",\n"prt": 1, "port": 2}'),
            "line 4: clusters[0].endpoints[0].prt: unknown key, did you mean `port`?; "
            "accepted: address, port, weight, labels, max_num_seqs, metadata, draining",
        ),
        (
            cluster('{"address": "h", "port": 0}'),
            "line 3: clusters[0].endpoints[0].port: out of range: 0; accepted: an integer from 1 to 65535",
        ),
        (
            cluster('{"address": "h", "port": 1}', '{"address": "h", "port": 65536}'),
            "line 4: clusters[0].endpoints[1].port: out of range: 65536; "
            "accepted: an integer from 1 to 65535",
        ),
        (
            cluster('{"address": "h", "port": "80"}'),
            'line 3: clusters[0].endpoints[0].port: wrong type: "80"; accepted: an integer from 1 to 65535',
        ),
        (
            cluster('{"address": "h", "port": 1, "weight": 1001}'),
            "line 3: clusters[0].endpoints[0].weight: out of range: 1001; "
            "accepted: an integer from 1 to 1000",
        ),
        (
            cluster('{"address": "h"}'),
            "line 3: clusters[0].endpoints[0].port: the key is required; "
            "accepted: an integer from 1 to 65535",
        ),
        (
            cluster('{"address": "H", "port": 1}', '{"address": "h", "port": 1}'),
            "line 4: clusters[0].endpoints[1]: the endpoint h port 1 is given twice; accepted: one",
        ),
        (
            '{"clusters": [{"name": "a", "endpoints": []},\n\n{"endpoints": [],\n"name": "a"}]}',
            "line 4: clusters[1].name: the cluster `a` is given twice; accepted: one",
        ),
        (
            cluster('{"address": "h", "port": 1,\n "port": 2}'),
            "line 3: clusters[0].endpoints[0].port: the key is given twice, again at line 4",
        ),
        (
            '{"clusters": [{"x": 1}],\n"clusters": [{"x": 1}]}',
            "line 1: clusters: the key is given twice, again at line 2",
        ),
        ('{"a": 1,\n"clusters": NaN}', "line 2: not valid JSON: NaN is no JSON number"),
        (f'{{\n"clusters": {"9" * 5_000}}}', "line 2: an integer without end; accepted: up to 300 digits"),
        ("[]", "line 1: wrong type: a list of 0; accepted: a mapping with the keys clusters"),
    ],
)
def test_a_mistake_is_named_with_line_key_and_what_is_accepted(text: str, expected: str) -> None:
    """One mistake gives one line that suffices to repair it."""
    assert problems(text) == [expected]


@pytest.mark.parametrize(("number", "refused"), [(MAX_ENDPOINTS, False), (MAX_ENDPOINTS + 1, True)])
def test_more_endpoints_than_are_counted_are_refused(number: int, refused: bool) -> None:
    """In all clusters together; one that two clusters list is one."""
    endpoints = [{"address": f"10.0.{i // 250}.{i % 250}", "port": 1} for i in range(number)]
    clusters = [{"name": "a", "endpoints": endpoints}, {"name": "b", "endpoints": endpoints[:9]}]
    expected = f"line 1: clusters: {MAX_ENDPOINTS + 1} endpoints in all; accepted: at most {MAX_ENDPOINTS}"
    assert problems(json.dumps({"clusters": clusters})) == [expected] * refused


def test_same_address_may_serve_two_clusters() -> None:
    """Duplicates are per cluster: one engine can be in several."""
    endpoint = [{"address": "h", "port": 1}]
    text = json.dumps(
        {"clusters": [{"name": "a", "endpoints": endpoint}, {"name": "b", "endpoints": endpoint}]}
    )
    assert len(parse_clusters(text, "x")) == 2


@pytest.mark.parametrize(
    ("text", "line"), [('{"clusters": []}x', 1), ('{\n"clusters": [,]}', 2), ("", 1), ('{"clusters": "[', 1)]
)
def test_json_syntax_errors_give_the_line(text: str, line: int) -> None:
    """A text that is no JSON is refused with the line of the fault."""
    assert problems(text)[0].startswith(f"line {line}: not valid JSON: ")


@pytest.mark.parametrize("level", ["[", '{"a": ', '["\\"]", '])
@pytest.mark.parametrize("levels", [65, 1_001, 100_000])
def test_nesting_without_end_is_refused_in_our_words(level: str, levels: int) -> None:
    """Nesting has our bound, whatever the JSON reader's own is and whether the text ends well."""
    assert problems("\n" + level * levels) == ["line 2: nested too deep; accepted: 64 levels"]


def test_brackets_that_nest_nothing_are_not_counted() -> None:
    """Brackets in text, escaped quotes between them, and brackets beside each other are no levels."""
    labels = json.dumps({f"l{i}": '["\\' * 80 for i in range(3)})
    text = cluster(*(f'{{"address": "h{i}", "port": 1, "labels": {labels}}}' for i in range(100)))
    assert len(parse_clusters(text, "x")[0].endpoints) == 100


labels = st.dictionaries(st.text(min_size=1, max_size=5), st.text(max_size=5), max_size=3)


@settings(max_examples=100)
@given(
    st.lists(
        st.tuples(
            st.ip_addresses().map(str).filter(lambda ip: "::ffff:" not in ip),
            st.integers(1, 65_535),
            st.integers(1, 1000),
            labels,
        ),
        unique_by=lambda endpoint: endpoint[:2],
        max_size=5,
    ),
    st.sampled_from([None, 0, 2]),
)
def test_every_valid_file_is_read_back(
    endpoints: list[tuple[str, int, int, dict[str, str]]], indent: int | None
) -> None:
    """Whatever the layout of the file, each endpoint arrives as written."""
    written = [
        {"address": address, "port": port, "weight": weight, "labels": own}
        for address, port, weight, own in endpoints
    ]
    text = json.dumps({"clusters": [{"name": "a", "endpoints": written}]}, indent=indent)
    assert parse_clusters(text, "x")[0].endpoints == tuple(EndpointSpec(*endpoint) for endpoint in endpoints)


@settings(max_examples=200)
@given(st.text(alphabet='{}[]:,"\\u12n \nabcdef') | st.text())
def test_any_text_is_clusters_or_a_config_error(text: str) -> None:
    """No text whatever raises anything but ConfigError."""
    assert all(problem.startswith("line ") for problem in problems(text))


@settings(max_examples=200)
@given(
    st.recursive(
        st.none() | st.booleans() | st.integers() | st.text(max_size=3),
        lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    ),
    st.sampled_from(["clusters", "name", "endpoints", "labels"]),
)
def test_any_json_is_clusters_or_a_config_error(value: object, key: str) -> None:
    """Values of any shape in any place are refused with the place named."""
    cluster_object = {"name": "a", "endpoints": [], key: value}
    text = json.dumps({"clusters": value if key == "clusters" else [cluster_object]}, indent=1)
    assert all("clusters" in problem for problem in problems(text))


def test_names_that_envoy_has_for_itself_are_refused() -> None:
    """Every static cluster of the bootstrap, and the one that must not be there."""
    static = yaml.safe_load((ROOT / "envoy" / "bootstrap.yaml").read_text())["static_resources"]["clusters"]
    names = {each["name"] for each in static}
    assert names | {"tokenway-none"} == OWN_CLUSTERS
    for name in OWN_CLUSTERS:
        with pytest.raises(
            ConfigError, match=rf"clusters\[0\].name: the name `{name}` is one of Envoy's own"
        ):
            parse_clusters(json.dumps({"clusters": [{"name": name, "endpoints": []}]}), "clusters.json")


@pytest.mark.parametrize("name", ["model:m", "model:", "model:tokenway-xds"])
def test_names_of_models_aliases_are_refused(name: str) -> None:
    """While Tokenway is away Envoy serves a model by a cluster of that name, whoever made it."""
    with pytest.raises(
        ConfigError, match=r"clusters\[0\].name: `model:` begins the names of Envoy's clusters"
    ):
        parse_clusters(json.dumps({"clusters": [{"name": name, "endpoints": []}]}), "clusters.json")
    parse_clusters(json.dumps({"clusters": [{"name": "my-model:m", "endpoints": []}]}), "clusters.json")


@pytest.mark.parametrize("name", ["*", "xdstp:", "xdstp://authority/cluster"])
def test_names_that_mean_something_else_to_envoy_are_refused(name: str) -> None:
    """All resources of a type, and one of another server: Envoy refuses what it is told of such a cluster."""
    with pytest.raises(
        ConfigError, match=rf"clusters\[0\].name: the name `{re.escape(name)}` means something"
    ):
        parse_clusters(json.dumps({"clusters": [{"name": name, "endpoints": []}]}), "clusters.json")
    parse_clusters(json.dumps({"clusters": [{"name": f"a{name}", "endpoints": []}]}), "clusters.json")
