"""What a configuration file may cost, and how much is said of one that is wrong: bounded by its size."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from extproc.config import loading, notation
from extproc.config.clusters import MAX_CLUSTERS, MAX_PLACES, parse_clusters
from extproc.config.document import MAX_PROBLEMS, shown
from extproc.config.loading import MAX_NAMES, parse, read_file, unlisted
from extproc.config.notation import read_json, read_yaml
from extproc.errors import ConfigError
from metadata_center.load.counters import MAX_ENDPOINTS

ENDLESS = "an anchor here contains itself or expands without end"


def refusal(read: Callable[[str, str], object], text: str) -> list[str]:
    """The problems of a text, none if it is accepted."""
    try:
        read(text, "x")
    except ConfigError as error:
        return error.problems
    return []


def levels(first: str, level: str, many: str) -> str:
    """Ten levels of YAML, each of which has the one before ten times."""
    anchored = [f"x{i}: &a{i} {level.replace('_', ', '.join([f'*a{i - 1}'] * 10))}" for i in range(1, 11)]
    return "\n".join([f"x0: &a0 {first}", *anchored, many])


@pytest.mark.parametrize(
    ("first", "level"),
    [("[1]", "[_]"), ("{k: 1}", "{<<: [_]}"), ("{}", "{<<: [_]}"), ("[{k: 1}]", "[{<<: *a0}, _]")],
)
def test_anchors_that_multiply_are_refused_also_where_they_are_merged(first: str, level: str) -> None:
    """A kilobyte of ten billion values: a merge puts each in the place of the one before, without end."""
    assert refusal(read_yaml, levels(first, level, ""))[0].endswith(ENDLESS)


def test_a_mapping_may_be_merged_often() -> None:
    """A bound on what is built is none on how often a block is shared."""
    models = "".join(f"  m{i}: {{<<: *base}}\n" for i in range(2_000))
    config = parse(f"models:\n  base: &base {{rules: [{{cluster: c}}]}}\n{models}", "x")
    assert len(config.models) == 2_001


def test_names_of_models_are_bounded() -> None:
    """Aliases are names as well; too many models are not looked at one by one."""
    models = "".join(f"  m{i}: {{rules: [{{cluster: c}}]}}\n" for i in range(MAX_NAMES))
    assert refusal(parse, f"models:\n{models}") == []
    many = f"line 1: models: {MAX_NAMES + 1} names of models and aliases; accepted: at most {MAX_NAMES}"
    assert refusal(parse, f"models:\n{models}  more: {{rules: what}}\n") == [many]
    aliased = models.replace("m0: {", "m0: {aliases: [a], ", 1)
    assert refusal(parse, f"models:\n{aliased}") == [many]


def test_rules_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of all models together."""
    monkeypatch.setattr(loading, "MAX_RULES", 3)
    text = "models: {m: {rules: [{cluster: c}, {cluster: d}]}, n: {rules: [{cluster: c}%s]}}"
    assert refusal(parse, text % "") == []
    assert refusal(parse, text % ", {cluster: d}") == ["line 1: models: 4 rules; accepted: at most 3"]


@pytest.mark.parametrize("tail", ["", ".5"])
def test_numbers_by_sixties_are_bounded_before_they_are_counted(
    monkeypatch: pytest.MonkeyPatch, tail: str
) -> None:
    """YAML 1.1 reads 1:59:59 as a number, which takes the square of its length; PyYAML is not asked."""

    def never(*_: object) -> None:
        pytest.fail("it was counted")

    monkeypatch.setattr("yaml.constructor.SafeConstructor.construct_object", never)
    text = "[" + "1" + ":59" * 1_000 + tail + "]"
    assert refusal(read_yaml, text) == ["line 1: [0]: an integer without end; accepted: up to 300 digits"]


def test_values_of_yaml_are_counted_before_they_are_made(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is too much is refused as it is read, with its line; nothing is composed of it."""
    monkeypatch.setattr("yaml.compose", lambda *_, **__: pytest.fail("it was composed"))
    text = "- 1\n" * 700_000
    assert refusal(read_yaml, text) == ["line 599999: too many values; accepted: 200000 in all"]


def test_a_large_text_that_is_no_yaml_is_scanned_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """PyYAML's own scanner, a hundred times slower, looks at small ones alone."""
    loaders: list[Any] = []
    count = notation._count_levels

    def counting(text: str, path: str, loader: Any) -> None:
        loaders.append(loader)
        count(text, path, loader)

    monkeypatch.setattr(notation, "_count_levels", counting)
    text = "a: [\n" + "#" * notation._MAX_RESCANNED_CHARS + "\n\t{"
    assert "not valid YAML" in refusal(read_yaml, text)[0]
    assert len(loaders) == 1


@pytest.mark.parametrize("value", ["0", "[]", "{}"])
def test_values_of_json_are_bounded(value: str) -> None:
    """Whatever they are, in one line, and none of it is validated."""
    text = "[" + ",".join([value] * 500_001) + "]"
    assert refusal(read_json, text) == ["line 1: too many values; accepted: 500000 in all"]


def test_a_long_text_in_json_costs_no_more_than_its_length() -> None:
    """Brackets in it are none, however long it is, and a wrong value is not repeated in full."""
    text = '{"clusters": "' + "[{\\n" * 1_000_000 + '"}'
    [problem] = refusal(parse_clusters, text)
    assert problem.startswith('line 1: clusters: wrong type: "[{')
    assert len(problem) < 250


def test_clusters_are_bounded_before_they_are_looked_at() -> None:
    """Clusters without endpoints count too: each is one of Envoy's."""
    clusters = [{"name": f"c{i}", "endpoints": []} for i in range(MAX_CLUSTERS + 1)]
    text = f"line 1: clusters: {MAX_CLUSTERS + 1} clusters; accepted: at most {MAX_CLUSTERS}"
    assert refusal(parse_clusters, json.dumps({"clusters": clusters})) == [text]
    assert refusal(parse_clusters, json.dumps({"clusters": clusters[1:]})) == []


def test_endpoints_are_bounded_however_many_clusters_list_them() -> None:
    """The same endpoint in all clusters is one to Tokenway, and as many to Envoy."""
    endpoints = [{"address": "10.0.0.1", "port": port} for port in range(1, MAX_PLACES // 16 + 1)]
    clusters = [{"name": f"c{i}", "endpoints": endpoints} for i in range(16)]
    assert refusal(parse_clusters, json.dumps({"clusters": clusters})) == []
    clusters.append({"name": "more", "endpoints": endpoints[:1]})
    assert refusal(parse_clusters, json.dumps({"clusters": clusters})) == [
        f"line 1: clusters: endpoints in {MAX_PLACES + 1} places; "
        f"accepted: at most {MAX_PLACES}, and {MAX_ENDPOINTS} of them"
    ]


def test_the_same_mistake_in_every_endpoint_is_a_hundred_lines() -> None:
    """The first ones of the file, and how many more there are: a log has a bound as well."""
    endpoints = [{"address": "10.0.0.1", "port": port, "wieght": 1} for port in range(1, 1_001)]
    text = json.dumps({"clusters": [{"name": "c", "endpoints": endpoints}]}, indent=0)
    problems = refusal(parse_clusters, text)
    assert len(problems) == MAX_PROBLEMS + 1
    assert problems[0].startswith(
        "line 9: clusters[0].endpoints[0].wieght: unknown key, did you mean `weight`"
    )
    assert problems[MAX_PROBLEMS - 1].split(": ")[1] == "clusters[0].endpoints[99].wieght"
    assert problems[-1] == "and 900 more problems"


def test_a_mistyped_name_among_thousands_lists_some() -> None:
    """Each of many rules with a cluster that is not listed has the first clusters, not all of them."""
    names = [f"cluster-{i}" for i in range(MAX_CLUSTERS)]
    clusters = parse_clusters(
        json.dumps({"clusters": [{"name": name, "endpoints": []} for name in names]}), "x"
    )
    text = "models:\n" + "".join(f"  m{i}: {{rules: [{{cluster: klaster}}]}}\n" for i in range(150))
    places = unlisted(parse(text, "x"), clusters, read_yaml(text, "x"))
    assert len(places) == MAX_PROBLEMS + 1
    assert places[0].endswith(f", cluster-49, and {MAX_CLUSTERS - 50} more")
    assert places[-1] == "and 50 more problems"


def test_a_key_without_end_is_cut() -> None:
    """Names have 256 characters at most, so the rest recognises nothing."""
    [problem] = refusal(parse_clusters, json.dumps({"clusters": [], "k" * 100_000: 1}))
    assert problem.startswith(f"line 1: {'k' * 256}…: unknown key")
    assert len(problem) < 1_000


def test_a_file_is_refused_before_it_is_read_to_its_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is named with what is accepted."""
    monkeypatch.setattr(loading, "MAX_FILE_BYTES", 10)
    file = tmp_path / "tokenway.yaml"
    file.write_text("version: 1")
    assert read_file(file) == "version: 1"
    file.write_text("version: 1\n")
    with pytest.raises(ConfigError, match=r"cannot be read: too large; accepted: 10 bytes"):
        read_file(file)


@pytest.mark.parametrize(
    "text",
    [
        "metadata_center: redis://user:hunter2@10.0.0.5:6379/0",
        "metadata_center: {url: [1], gateway: 'redis://:hunter2@h'}",
        "metadata_center: {password_env: 'hunter2!'}",
        "metadata_center: {sentinel_password_env: 'hunter2!'}",
        "explain: {debug_token_env: 'hunter2!'}",
        "default_cluster: {}\nedge: 'redis+sentinel://h/?sentinel_password=hunter2'",
        "admin: 'rediss://u:hun@ter2/hunter2@h'",
    ],
)
def test_what_is_wrong_quotes_no_secret(text: str) -> None:
    """A URL in the wrong place, and a secret in that of the variable which has it."""
    problems = refusal(parse, text)
    assert problems
    assert "hunter2" not in "\n".join(problems)


def test_half_a_character_is_refused_in_our_words_and_can_be_printed() -> None:
    """JSON can say half a pair of UTF-16, which no name, label or log can have."""
    endpoint = '{"address": "10.0.0.1", "port": 1, "labels": {"tier": "\\ud800"}}'
    [problem] = refusal(parse_clusters, f'{{"clusters": [{{"name": "c", "endpoints": [{endpoint}]}}]}}')
    assert problem.startswith("line 1: clusters[0].endpoints[0].labels.tier: not Unicode text: ")
    assert problem.encode().isascii()
    assert shown("\ud800").encode() == b'"\\ud800"'
