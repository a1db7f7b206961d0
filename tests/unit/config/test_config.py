"""tokenway.yaml: what it means, and what is said about mistakes."""

from __future__ import annotations

import json
from dataclasses import fields
from pathlib import Path

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from extproc.config.clusters import ClusterSpec
from extproc.config.loading import (
    clusters_path,
    effective,
    json_schema,
    load_all,
    parse,
    unlisted,
    with_defaults,
)
from extproc.config.notation import read_yaml
from extproc.config.schema import Config
from extproc.config.sections.engines import Health
from extproc.config.sections.models import LoadBalancingSection, RuleSection
from extproc.errors import ConfigError
from extproc.health.settings import HealthSettings
from extproc.request.rules import Backend, ModelRules, Rule, RuleTable
from extproc.values.balancing import Algorithm, LoadBalancing
from testbed.chart_schema import ROOT, SCHEMA_FILE, written

ETC = Path(__file__).parents[3] / "etc"

TOO_LONG = "an integer without end; accepted: up to 300 digits"

ONE_MODEL = """
models:
  llama:
    rules: [{cluster: a}]
"""


def problems(text: str) -> list[str]:
    """The problems of a file; none for a good one."""
    try:
        parse(text, "tokenway.yaml")
    except ConfigError as error:
        return error.problems
    return []


def the_problem(text: str) -> str:
    """The only problem of a file."""
    found = problems(text)
    assert len(found) == 1, found
    return found[0]


@pytest.mark.parametrize("text", ["", "# nothing\n", "version: 1\n", "health:\nload:\nmodels:\n"])
def test_empty_file_and_empty_sections_are_all_defaults(text: str) -> None:
    """Leaving everything out, or naming sections without content, gives the defaults."""
    assert parse(text, "x") == Config()


def test_defaults_of_health_and_load_balancing_are_those_of_their_owners() -> None:
    """The file's defaults are the dataclasses' defaults, and every field has a key."""
    assert Health().settings() == HealthSettings()
    assert LoadBalancingSection().settings() == LoadBalancing()
    assert set(Health.model_fields) == {field.name for field in fields(HealthSettings)}
    assert set(LoadBalancingSection.model_fields) == {field.name for field in fields(LoadBalancing)}
    assert set(RuleSection.model_fields) == {field.name for field in fields(Rule)}


def test_documented_defaults_hold() -> None:
    """The defaults that operators rely on are these numbers."""
    config = Config()
    assert (config.server.workers, config.server.run_dir, config.server.drain_s) == (1, None, 30)
    assert (config.server.admin.address, config.server.admin.port) == ("127.0.0.1", 10080)
    assert (config.request.max_body_bytes, config.request.block_bytes) == (32 * 1024 * 1024, 512)
    assert (config.signals.timeout_s, config.signals.first_byte_timeout_s) == (600, 60)
    assert (config.load.lease_s, config.explain.ring_size) == (180, 2000)
    assert (config.cache.max_blocks_per_endpoint, config.cache.default_kv_tokens) == (200_000, 100_000)
    assert config.default_cluster is None
    assert config.explain.debug_token_env is None


def test_unset_load_balancing_keys_keep_defaults_and_are_not_zero() -> None:
    """Setting one weight leaves the others at their defaults, unlike in AIGW."""
    text = ONE_MODEL + "    load_balancing: {prefill_load_weight: 0, request_load_weight: null}\n"
    expected = LoadBalancing(algorithm=Algorithm.INFERENCE_LB, prefill_load_weight=0.0)
    assert parse(text, "x").models["llama"].load_balancing.settings() == expected


@pytest.mark.parametrize(
    ("section", "algorithm"),
    [
        ("{}", Algorithm.LEAST_COMPLETION),
        ("{fallbacks: 1}", Algorithm.LEAST_COMPLETION),
        ("{cache_ratio_weight: 2}", Algorithm.INFERENCE_LB),
        ("{cache_radio_weight: 2}", Algorithm.INFERENCE_LB),
        ("{cache_aware_enable: false}", Algorithm.INFERENCE_LB),
        ("{cache_aware_enable: false, algorithm: prefix_cache}", Algorithm.PREFIX_CACHE),
        ("{cache_ratio_weight: 2, algorithm: least_completion}", Algorithm.LEAST_COMPLETION),
    ],
)
def test_a_file_with_aigws_keys_keeps_aigws_score(section: str, algorithm: Algorithm) -> None:
    """Weights without an algorithm are not silently without effect."""
    text = ONE_MODEL + f"    load_balancing: {section}\n"
    assert parse(text, "x").models["llama"].load_balancing.settings().algorithm is algorithm


def test_misspelt_cache_weight_of_aigw_is_understood() -> None:
    """AIGW's `cache_radio_weight` sets the cache weight; giving both spellings is an error."""
    one = parse(ONE_MODEL + "    load_balancing: {cache_radio_weight: 7}\n", "x")
    assert one.models["llama"].load_balancing.cache_ratio_weight == 7
    both = ONE_MODEL + "    load_balancing: {cache_ratio_weight: 7, cache_radio_weight: 7}\n"
    assert "in its other spelling as well" in the_problem(both)
    unset = parse(ONE_MODEL + "    load_balancing: {cache_radio_weight: null}\n", "x")
    assert unset.models["llama"].load_balancing.settings() == LoadBalancing()


def test_allowed_headers_are_kept_in_lower_case() -> None:
    """Envoy's header names are lower-case, however the file writes them."""
    config = parse("request: {allow_headers: [X-Session-Token]}", "x")
    assert config.request.allow_headers == ("x-session-token",)


@pytest.mark.parametrize("name", ["model:m", "engine_tls:m", "tokenway-xds", "*"])
@pytest.mark.parametrize(
    "text",
    [
        "default_cluster: {name}",
        "models: {{m: {{rules: [{{cluster: {name}}}]}}}}",
        "discovery: {{kubernetes: {{pool: {{name: a, cluster: {name}}}}}}}",
        "discovery: {{kubernetes: {{services: [{{name: a, cluster: {name}}}]}}}}",
        "discovery: {{kubernetes: {{selectors: "
        "[{{name: {name}, match_labels: {{a: b}}, target_ports: [80]}}]}}}}",
    ],
)
def test_names_that_envoy_has_for_clusters_of_ours_are_refused(text: str, name: str) -> None:
    """Whoever lists the cluster: while Tokenway is away Envoy would send there what asks for a model."""
    problem = the_problem(text.format(name=f'"{name}"'))
    assert "accepted: any other" in problem


def test_rules_become_the_rule_table_of_the_request_path() -> None:
    """Every key of a rule arrives in the core's `Rule`, with header names in lower case."""
    text = """
models:
  llama:
    aliases: [l]
    rules:
      - {cluster: a, backend: sglang, headers: {X-Tier: Gold}, subset: {gpu: h200}, weight: 3,
         lora: sql, model: up, route_name: r, endpoint_group: g}
    load_balancing: {algorithm: random, fallbacks: 0}
"""
    rule = Rule("a", Backend.SGLANG, {"x-tier": "Gold"}, {"gpu": "h200"}, 3, "sql", "up", "r", "g")
    lb = LoadBalancing(algorithm=Algorithm.RANDOM, fallbacks=0)
    config = parse(text, "x")
    assert config.rules() == (ModelRules("llama", (rule,), ("l",), lb),)
    RuleTable(config.rules())


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (
            "version: 1\nserver:\n  worker: 2",
            "line 3: server.worker: unknown key, did you mean `workers`?; "
            "accepted: workers, run_dir, listen, listen_tls, listen_insecure, admin, transport, drain_s",
        ),
        ("version: 2", "line 1: version: unknown value: 2; accepted: 1"),
        (
            "health: {INTERVAL_S: 1}",
            "line 1: health.INTERVAL_S: unknown key, did you mean `interval_s`?; accepted: path, interval_s, "
            "recovery_interval_s, timeout_s, unhealthy_threshold, passive_threshold, ejection_s, "
            "max_ejection_s, min_available_ratio",
        ),
        (
            "health: {interval_s: 1e3}",
            'line 1: health.interval_s: wrong type: "1e3" (YAML 1.1 takes it for text: without an exponent); '
            "accepted: a number > 0 and <= 86400",
        ),
        (
            'clusters_file: "a\\0b"',
            "line 1: clusters_file: text with a NUL, which neither paths nor headers may have",
        ),
        (
            "\nlogging:\n  level: loud",
            'line 3: logging.level: unknown value: "loud"; accepted: debug, info, warning, error',
        ),
        (
            "server: {admin: {port: 70000}}",
            "line 1: server.admin.port: out of range: 70000; accepted: an integer from 0 to 65535",
        ),
        (
            "health:\n  interval_s: .inf",
            "line 2: health.interval_s: not a finite number: Infinity; accepted: a number > 0 and <= 86400",
        ),
        (
            "health:\n  timeout_s: 0",
            "line 2: health.timeout_s: out of range: 0; accepted: a number > 0 and <= 86400",
        ),
        (
            "metadata_center: {reserve_timeout_s: 0.45}",
            "line 1: metadata_center.reserve_timeout_s: out of range: 0.45; "
            "accepted: a number > 0 and <= 0.4",
        ),
        (
            "request: {block_bytes: 512.0}",
            "line 1: request.block_bytes: wrong type: 512.0; accepted: an integer from 64 to 65536",
        ),
        (
            'load: {lease_s: "180"}',
            'line 1: load.lease_s: wrong type: "180"; accepted: a number > 0 and <= 86400',
        ),
        (
            "signals: {first_chunk: 1}",
            "line 1: signals.first_chunk: wrong type: 1; accepted: true or false",
        ),
        (
            "clusters_file: yes",
            "line 1: clusters_file: wrong type: true; "
            "accepted: text of 1 to 256 characters (quote numbers and yes/no)",
        ),
        (
            "explain: {debug_token_env: 'a b'}",
            "line 1: explain.debug_token_env: malformed; accepted: text like `TOKENWAY_SECRET`",
        ),
        (
            "health: {ejection_s: 9, max_ejection_s: 5}",
            "line 1: health: max_ejection_s is below ejection_s; accepted: max_ejection_s >= 9.0",
        ),
        (
            "server:\n  listen:\n    - unix:/a\n    - 127.0.0.1",
            "line 4: server.listen[1]: not an address; "
            "accepted: text like `unix:/run/tokenway.sock`, `127.0.0.1:9000`, `[::]:9000`",
        ),
        (
            f"server: {{run_dir: /{'r' * 94}}}",
            "line 1: server.run_dir: too long for the sockets in it; accepted: 94 bytes",
        ),
        (
            f"server: {{run_dir: /{'ü' * 47}}}",
            "line 1: server.run_dir: too long for the sockets in it; accepted: 94 bytes",
        ),
        (
            f"server: {{listen: ['unix:/{'s' * 107}']}}",
            "line 1: server.listen[0]: too long for a Unix socket; accepted: a path of 107 bytes",
        ),
        (
            "server: {listen: ['0.0.0.0:9000']}",
            "line 1: server: listen has 0.0.0.0:9000, which others can reach in clear text: they could steer "
            "traffic and read prompts; accepted: loopback, listen_tls, or listen_insecure: true",
        ),
        (
            "edge: {cors: {origins: [chat.example.com]}}",
            'line 1: edge.cors.origins[0]: malformed: "chat.example.com"; '
            "accepted: text like `https://chat.example.com`",
        ),
        (
            "server: {admin: {address: localhost}}",
            "line 1: server.admin.address: not an IP address; "
            "accepted: text like `127.0.0.1`, `0.0.0.0`, `::`",
        ),
        *(
            (
                f"models:\n  a:\n    rules:\n      - {{cluster: c, headers: {{{name}: x}}}}",
                f"line 4: models.a.rules[0].headers: {problem}",
            )
            for name, problem in {
                "Authorization": "`authorization` is a secret, which Envoy keeps from Tokenway; "
                "accepted: a header that reveals nothing else, such as x-tier",
                "Host": "`host` arrives under another name; accepted: `:authority`",
                '":protocol"': "`:protocol` is no header of a request; "
                "accepted: :authority, :method, :path, :scheme",
                "Connection": "`connection` is of one connection and never arrives; "
                "accepted: end-to-end headers",
                "X-Session-Token": "`x-session-token` is taken from clients at Envoy's edge; "
                "accepted: names in request.allow_headers",
                "x-envoy-force-trace": "`x-envoy-force-trace` is this gateway's or Envoy's own, and taken "
                "from clients; accepted: other names, and x-envoy-external-address",
            }.items()
        ),
        ("a: 1\nversion: 1\nversion: 1", "line 2: version: the key is given twice, again at line 3"),
        ("models:\n  8: {}", "line 2: models.8: the key is not text: put it in quotes"),
        (
            "load: &x {lease_s: *x}",
            "line 1: load.lease_s: an anchor here contains itself or expands without end",
        ),
        ("load: {lease_s: 2001-99-99}", "line 1: load.lease_s: cannot be read as timestamp: quote it"),
        *(
            (f"load: {{lease_s: {text}}}", f"line 1: load.lease_s: cannot be read as {kind}: quote it")
            for text, kind in {
                "!!bool maybe": "bool",
                "!!int ''": "int",
                "!!float ''": "float",
                "!!timestamp soon": "timestamp",
                "1" + ":1" * 400 + ".5": "float",  # in base 60, beyond what a float can be
            }.items()
        ),
        (
            f"edge: {{max_heap_bytes: {2**63}}}",
            f"line 1: edge.max_heap_bytes: out of range: {2**63}; "
            f"accepted: an integer from 67108864 to {2**63 - 1}",
        ),
        ("<<: 1", "line 1: `<<` needs a mapping"),
        ("load: {lease_s: 0x" + "f" * 5_000 + "}", f"line 1: load.lease_s: {TOO_LONG}"),
    ],
)
def test_a_mistake_is_named_with_line_key_and_what_is_accepted(text: str, expected: str) -> None:
    """One mistake gives one line that suffices to repair it."""
    assert the_problem(text) == expected


@pytest.mark.parametrize(
    ("level", "last_line"),
    [
        ("[", False),
        ("{a: ", False),
        ("- ", False),
        ("? ", False),
        ("[\n", True),
        ("['don''t', \"\\\"[\", ", False),
    ],
)
@pytest.mark.parametrize("levels", [65, 1_001, 100_000])
def test_nesting_is_refused_in_our_words(level: str, last_line: bool, levels: int) -> None:
    """Whatever bound the library has, on its own side of ours or beyond, ours is the one that speaks."""
    line = 65 if last_line else 1
    assert the_problem(level * levels) == f"line {line}: nested too deep; accepted: 64 levels"


def test_brackets_that_nest_nothing_are_not_counted() -> None:
    """Brackets in quotes, in comments and beside each other are no levels."""
    many = "[" * 200
    aliases = ", ".join(f"[a{i}]" for i in range(100))
    assert problems(f"# {many}\nclusters_file: '{many}'\n") == []
    assert the_problem(f"models: [{aliases}]").startswith("line 1: models: wrong type")


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (
            "models:\n  a:\n    aliases: []",
            "line 2: models.a.rules: the key is required; accepted: a list of at least one, each item "
            "a mapping with the keys cluster, backend, headers, subset, weight, lora, model, route_name, "
            "endpoint_group",
        ),
        (
            "models:\n  a:\n    rules: []",
            "line 3: models.a.rules: too few items: a list of 0; accepted: a list of at least one, each item "
            "a mapping with the keys cluster, backend, headers, subset, weight, lora, model, route_name, "
            "endpoint_group",
        ),
        (
            "models:\n  a:\n    rules:\n      - cluster: c\n      - cluster: c\n        backend: vlm",
            'line 6: models.a.rules[1].backend: unknown value: "vlm"; '
            "accepted: vllm, sglang, tensorrt-llm, openai",
        ),
        (
            "models:\n  a:",
            "line 2: models.a: wrong type: null; "
            "accepted: a mapping with the keys aliases, rules, load_balancing, tokenizer, "
            "chat_template_kwargs",
        ),
        (
            "models:\n  a:\n    rules:\n      - {cluster: c, weight: 0}",
            "line 3: models.a.rules: every rule has weight 0; accepted: at least one rule above 0",
        ),
        (
            "models:\n  a:\n    rules:\n      - {cluster: c, headers: {A: x, a: y}}",
            "line 4: models.a.rules[0].headers: two header names differ in letter case only; "
            "accepted: distinct names",
        ),
        (
            "models:\n  a:\n    rules: [{cluster: c}]\n    load_balancing:\n      candidate_percent: 101",
            "line 5: models.a.load_balancing.candidate_percent: out of range: 101; "
            "accepted: an integer from 0 to 100",
        ),
        (
            "models:\n  a:\n    rules: [{cluster: c}]\n    load_balancing: {request_load_weight: -0.1}",
            "line 4: models.a.load_balancing.request_load_weight: out of range: -0.1; "
            "accepted: a number >= 0",
        ),
        (
            "models:\n  a:\n    rules: [{cluster: c}]\n    load_balancing: {algorithm: rr}",
            'line 4: models.a.load_balancing.algorithm: unknown value: "rr"; '
            "accepted: inference_lb, least_completion, prefix_cache, least_request, round_robin, random",
        ),
        (
            "models:\n  a: {rules: [{cluster: c}], aliases: [x]}\n  b: {rules: [{cluster: c}], aliases: [x]}",
            "line 3: models.b.aliases[0]: `x` already names the model `a`; accepted: names not in use",
        ),
        (
            "models:\n  a: {rules: [{cluster: c}], aliases: [b]}\n  b: {rules: [{cluster: c}]}",
            "line 2: models.a.aliases[0]: `b` already names the model `b`; accepted: names not in use",
        ),
        (
            "models:\n  '': {rules: [{cluster: c}]}",
            'line 2: models.: too short: ""; '
            "accepted: text of 1 to 256 characters (quote numbers and yes/no)",
        ),
    ],
)
def test_a_mistake_in_a_model_is_named(text: str, expected: str) -> None:
    """Mistakes inside models and rules are named as precisely as elsewhere."""
    assert the_problem(text) == expected


def test_all_mistakes_are_reported_at_once_in_the_order_of_the_file() -> None:
    """An operator repairs a file in one go."""
    found = problems("models:\n  a: {rules: [{cluster: c, weight: -1}]}\nserver: {workers: 0}\nversion: 3")
    assert [problem.split(":")[0] for problem in found] == ["line 2", "line 3", "line 4"]


def test_a_wrong_list_item_does_not_also_count_as_missing() -> None:
    """A list whose only item is wrong is not called too short as well."""
    assert "models.a.rules[0].cluster" in the_problem("models: {a: {rules: [{cluster: 5}]}}")


@pytest.mark.parametrize(
    ("text", "line"),
    [("a: [1,\nb: }", 2), ("a: \x07", 1), ("x: 1\n--- 2", 2), ("a: *nowhere", 1), ("a:\n\t- 1", 2)],
)
def test_yaml_syntax_errors_give_the_line(text: str, line: int) -> None:
    """A text that is no YAML is refused with the line of the fault."""
    assert the_problem(text).startswith(f"line {line}: not valid YAML: ")


def test_reasoning_split_is_refused_with_the_alternative() -> None:
    """A request for reasoning splitting learns why it cannot be and what to do instead."""
    text = the_problem("reasoning_split: true")
    assert text.startswith("line 1: reasoning_split: tokens do not pass through Tokenway")
    assert "--reasoning-parser" in text
    assert parse("reasoning_split: false", "x") == Config()


def test_anchors_and_merge_keys_work_and_keep_lines() -> None:
    """A shared block can be written once; a key beside the merge wins."""
    text = """
models:
  a: &base
    rules: [{cluster: c}]
    load_balancing: {fallbacks: 1}
  b:
    <<: *base
    load_balancing: {fallbacks: 9}
"""
    config = parse(text.replace("9", "3"), "x")
    assert [model.load_balancing.fallbacks for model in config.models.values()] == [1, 3]
    assert config.models["b"].rules == config.models["a"].rules
    assert the_problem(text).startswith("line 8: models.b.load_balancing.fallbacks: out of range")


def test_expanding_anchors_are_bounded() -> None:
    """Anchors that multiply without end are refused instead of filling memory."""
    levels = [f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 10)}]" for i in range(1, 12)]
    assert "expands without end" in problems("\n".join(["a0: &a0 [1]", *levels]))[0]


@settings(max_examples=200)
@given(st.one_of(st.text(), st.text(alphabet="ab:-[]{}&*!<>|? \n\t'\"#%@019.~")))
def test_any_text_is_a_config_or_a_config_error(text: str) -> None:
    """No text whatever raises anything but ConfigError, whose problems all name a line."""
    assert all(problem.startswith("line ") for problem in problems(text))


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=6,
)


@settings(max_examples=200)
@given(st.sampled_from(sorted(Config.model_fields)), json_values)
def test_any_value_of_any_key_is_accepted_or_named(key: str, value: object) -> None:
    """A wrong value of any shape is a ConfigError that names the key it is under."""
    assert all(key in problem for problem in problems(yaml.safe_dump({key: value})))


@st.composite
def configs(draw: st.DrawFn) -> Config:
    """Valid configurations, with names that YAML would misread unquoted."""
    names = draw(st.lists(st.text(alphabet="abc:/.-1 é", min_size=1, max_size=8), unique=True, max_size=3))
    return Config.model_validate(
        {
            "server": {"workers": draw(st.integers(1, 64)), "listen": ["unix:/x", "[::1]:9"]},
            "health": {"interval_s": draw(st.floats(0.001, 86400))},
            "default_cluster": draw(st.none() | st.just("yes")),
            "models": {
                name: {
                    "rules": [{"cluster": "1", "backend": draw(st.sampled_from(sorted(Backend)))}],
                    "load_balancing": {"cache_ratio_weight": draw(st.floats(0, 1e9))},
                }
                for name in names
            },
        }
    )


@settings(max_examples=50)
@given(configs())
def test_effective_configuration_parses_to_itself(config: Config) -> None:
    """What `--print-effective` writes is a file with the same meaning."""
    assert parse(effective(config), "x") == config


def test_published_schema_is_current() -> None:
    """etc/tokenway.schema.json is what the code generates."""
    assert json.loads((ETC / "tokenway.schema.json").read_text()) == json_schema()


def test_the_chart_has_the_same_schema() -> None:
    """`python -m testbed.chart_schema` would change nothing. What it refuses: test_chart_config.py."""
    text = SCHEMA_FILE.read_text(encoding="utf-8")
    assert written(text) == text
    assert json.loads(text)["properties"]["config"] == {"$ref": f"#/definitions/{ROOT}"}


def test_every_key_has_a_description_in_the_schema() -> None:
    """Editors can explain every key."""
    schema = json_schema()
    sections = [schema, *(part for part in schema["$defs"].values() if "properties" in part)]
    undescribed = [
        key
        for section in sections
        for key, part in section["properties"].items()
        if "description"
        not in {**part, **schema["$defs"].get(part.get("$ref", "").removeprefix("#/$defs/"), {})}
    ]
    assert undescribed == []


def test_sample_states_every_default() -> None:
    """etc/tokenway.yaml is valid, fits etc/clusters.json, and shows each default truthfully."""
    config, clusters = load_all(ETC / "tokenway.yaml")
    assert config.model_copy(update={"models": {}}) == Config()
    (model,) = config.models.values()
    assert model.load_balancing.settings() == LoadBalancing()
    assert {rule.cluster for rule in model.rules} == {cluster.name for cluster in clusters}
    shown = yaml.safe_load((ETC / "tokenway.yaml").read_text())
    for key, value in yaml.safe_load(effective(Config())).items():
        if key != "models":
            assert shown[key] == value


CLUSTERS = (ClusterSpec("a", ()), ClusterSpec("b", (), model="llama"), ClusterSpec("c", (), model="llama"))


def test_clusters_that_are_not_listed_are_found() -> None:
    """Of a rule or as default cluster, with line and alternatives."""
    text = "default_cluster: z\n" + ONE_MODEL.replace("cluster: a", "cluster: aa")
    assert unlisted(parse(text, "x"), CLUSTERS, read_yaml(text, "x")) == [
        "line 1: default_cluster: no cluster `z` in clusters.json; accepted: a, b, c",
        "line 5: models.llama.rules[0].cluster: no cluster `aa` in clusters.json, did you mean `a`?; "
        "accepted: a, b, c",
    ]
    assert unlisted(parse(ONE_MODEL, "x"), CLUSTERS, read_yaml(ONE_MODEL, "x")) == []


def test_without_models_every_cluster_is_one() -> None:
    """Clusters become models by their `model` or name; the same model in two clusters is two equal rules."""
    models = with_defaults(Config(), CLUSTERS).models
    assert {
        name: [(rule.cluster, rule.weight) for rule in model.rules] for name, model in models.items()
    } == {
        "a": [("a", 1)],
        "llama": [("b", 1), ("c", 1)],
    }


def test_named_models_are_left_alone() -> None:
    """A file that names models serves exactly those."""
    config = parse(ONE_MODEL, "x")
    assert with_defaults(config, CLUSTERS) is config


def test_clusters_file_is_relative_to_the_configuration() -> None:
    """A relative clusters_file is beside the configuration; an absolute one is where it says."""
    assert clusters_path(Config(), Path("/etc/x/tokenway.yaml")) == Path("/etc/x/clusters.json")
    assert clusters_path(Config(clusters_file="/c.json"), Path("/etc/x/t.yaml")) == Path("/c.json")


def test_load_reads_a_file_and_names_it_in_errors(tmp_path: Path) -> None:
    """Missing files, bytes that are no UTF-8 and bad contents are all ConfigErrors naming the path."""
    path = tmp_path / "tokenway.yaml"
    for content, problem in (
        (None, "cannot be read: No such file or directory"),
        (b"a: \xff", "cannot be read: not UTF-8 at byte 3"),
        (b"version: 7", "line 1: version: unknown value: 7; accepted: 1"),
    ):
        if content is not None:
            path.write_bytes(content)
        with pytest.raises(ConfigError) as caught:
            load_all(path)
        assert (caught.value.path, caught.value.problems) == (str(path), [problem])
    path.write_text("load: {lease_s: 5}")
    (tmp_path / "clusters.json").write_text('{"clusters": []}')
    config, _ = load_all(path)
    assert config.load.lease_s == 5


def test_configuration_is_immutable() -> None:
    """A loaded configuration cannot be changed in place."""
    with pytest.raises(ValueError, match="frozen"):
        Config().server.workers = 2


@pytest.mark.parametrize(
    "server",
    [
        "{listen: ['127.0.0.1:1', '[::1]:1', 'unix:/x']}",
        f"{{listen: ['unix:/{'s' * 106}'], run_dir: /{'r' * 93}}}",
        "{listen: ['10.0.0.1:1'], listen_insecure: true}",
        "{listen: ['[::]:1'], listen_tls: {cert_file: a, key_file: b, client_ca_file: c}}",
    ],
)
def test_what_may_be_listened_to(server: str) -> None:
    """Loopback, mutual TLS, or an operator who said so."""
    assert parse(f"server: {server}", "x").server.listen


@pytest.mark.parametrize("file", ["tokenway.yaml", "clusters.json"])
def test_a_byte_order_mark_is_no_mistake(file: str, tmp_path: Path) -> None:
    """Editors of Windows write one."""
    texts = {
        "tokenway.yaml": "models: {m: {rules: [{cluster: c}]}}\n",
        "clusters.json": '{"clusters": [{"name": "c", "endpoints": []}]}',
    }
    for name, text in texts.items():
        (tmp_path / name).write_text(text, encoding="utf-8-sig" if name == file else "utf-8")
    config, clusters = load_all(tmp_path / "tokenway.yaml")
    assert list(config.models) == ["m"]
    assert [cluster.name for cluster in clusters] == ["c"]


@pytest.mark.parametrize(
    ("url", "shown"),
    [
        ("redis://u:s3cret@h:6379/0", "redis://u:***@h:6379/0"),
        ("redis://:s3@cret@h:6379", "redis://:***@h:6379"),
        ("redis+sentinel://u:s3cret@h1:1,h2:2/m", "redis+sentinel://u:***@h1:1,h2:2/m"),
        ("redis://h:6379", "redis://h:6379"),
        (
            "redis+sentinel://h:1/m?sentinel_password=s3%2Fcret&sentinel_username=u",
            "redis+sentinel://h:1/m?sentinel_password=***&sentinel_username=u",
        ),
    ],
)
def test_no_part_of_the_stores_password_is_shown(url: str, shown: str) -> None:
    """Whatever characters it has."""
    text = effective(parse(f"metadata_center:\n  url: {url}", "x"))
    assert f"url: {shown}\n" in text
    assert "cret" not in text


@pytest.mark.parametrize(
    "url",
    [
        *("redis://u:s3/cret@h", "redis://u:s3cret@h:99999", "redis://u:s3cret@a,b", "redis://u:s3cret@h/x"),
        *(
            "redis://u:s3cret@h?retry=1",
            "redis+sentinel://u:s3cret@h",
            "http://u:s3cret@h",
            "https://h:0/s3cret",
            "reddis://u:s3cret@h",
            "unix:///s3cret.sock",
            "redis://:s3cret@h/0#x",
            f"redis://:s3cret@{'h' * 2_048}",
        ),
    ],
)
def test_a_url_that_the_store_would_refuse_is_refused_by_a_check(url: str) -> None:
    """By its key and line, and without a part of it, before anything starts by it."""
    with pytest.raises(ConfigError) as caught:
        parse(f"server: {{}}\nmetadata_center:\n  url: {url}", "x")
    (problem,) = caught.value.problems
    assert problem.startswith("line 3: metadata_center.url: ")
    assert "cret" not in problem
