"""`tokenway check FILE`."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

import pytest

from extproc.config.loading import parse
from metadata_center.load.counters import MAX_ENDPOINTS
from testbed.certificates import issued
from tokenway.cli.check import check

FILES = {
    "ca_file": "ca.pem",
    "client_ca_file": "ca.pem",
    "cert_file": "own.pem",
    "key_file": "own.key",
    "token_file": "token",
}
"""Setting -> the file in `pki` that is what it should be."""

CLUSTERS = '{"clusters": [{"name": "a", "endpoints": [{"address": "10.0.0.1", "port": 8000}]}]}'


@pytest.fixture
def config_file(tmp_path: Path) -> Path:
    """A tokenway.yaml and its clusters.json."""
    (tmp_path / "clusters.json").write_text(CLUSTERS)
    path = tmp_path / "tokenway.yaml"
    path.write_text("models:\n  llama:\n    rules: [{cluster: a}]\n")
    return path


@pytest.fixture(scope="module")
def pki(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A CA, a certificate of it, one whose key has a passphrase, and a text that is none."""
    folder = tmp_path_factory.mktemp("pki")
    issued(folder, "ca")
    issued(folder, "own", "ca")
    issued(folder, "locked", "ca")
    words = ["openssl", "pkcs8", "-topk8", "-in", "locked.key", "-out", "new.key", "-passout", "pass:secret"]
    subprocess.run(words, cwd=folder, check=True, capture_output=True, timeout=60)
    (folder / "new.key").replace(folder / "locked.key")
    (folder / "token").write_text("no certificate\n")
    return folder


def test_good_file_is_summed_up(config_file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A usable file exits 0 with its models, clusters and endpoints on standard output."""
    assert check(config_file) == 0
    out, err = capsys.readouterr()
    assert out.splitlines() == [
        f"{config_file}: ok",
        "  models:    1 (llama)",
        "  clusters:  1 (a)",
        "  endpoints: 1",
    ]
    assert err == ""


def test_rules_on_headers_that_envoy_may_withhold_are_named(
    config_file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The file is usable, but an Envoy that is running may not forward what its rules match."""
    config_file.write_text(
        "models: {llama: {rules: [{cluster: a, headers: {User-Agent: x, x-tier: y}}, {cluster: a}]}}\n"
    )
    assert check(config_file) == 0
    out, err = capsys.readouterr()
    assert out.startswith(f"{config_file}: ok\n")
    assert "rules match user-agent: " in err
    assert "tokenway bootstrap" in err


def test_a_clusters_file_of_another_name_is_recognised(
    config_file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Its name is what tells it from a tokenway.yaml."""
    config_file.write_text(CLUSTERS)
    assert check(config_file) == 1
    assert "clusters: this is a clusters file: give it a name that ends in .json" in capsys.readouterr().err


def test_clusters_file_alone_is_checked_with_all_defaults(
    config_file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A clusters.json needs no tokenway.yaml: each cluster is then a model."""
    assert check(config_file.with_name("clusters.json")) == 0
    assert "models:    1 (a)" in capsys.readouterr().out


def test_problems_go_to_standard_error_one_per_line(
    config_file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A file with two mistakes exits 1 with two lines, each naming the file."""
    config_file.write_text("version: 2\nloda: {}\n")
    assert check(config_file) == 1
    out, err = capsys.readouterr()
    assert out == ""
    assert err.splitlines()[0] == f"{config_file}: line 1: version: unknown value: 2; accepted: 1"
    assert err.splitlines()[1].startswith(f"{config_file}: line 2: loda: unknown key, did you mean `load`?")
    assert len(err.splitlines()) == 2


def test_more_endpoints_than_are_counted_fail_the_check(
    config_file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Before the first request does: the error names the bound."""
    endpoints = [{"address": f"10.0.{i // 250}.{i % 250}", "port": 1} for i in range(MAX_ENDPOINTS + 1)]
    clusters_file = config_file.with_name("clusters.json")
    clusters_file.write_text(json.dumps({"clusters": [{"name": "a", "endpoints": endpoints}]}))
    assert check(config_file) == 1
    out, err = capsys.readouterr()
    assert out == ""
    problem = f"clusters: {MAX_ENDPOINTS + 1} endpoints in all; accepted: at most {MAX_ENDPOINTS}"
    assert err == f"{clusters_file}: line 1: {problem}\n"


@pytest.mark.parametrize("content", [None, '{"clusters": 5}'])
def test_problems_of_the_clusters_file_name_that_file(
    config_file: Path, content: str | None, capsys: pytest.CaptureFixture[str]
) -> None:
    """A clusters file that is missing or wrong fails the check of the configuration that names it."""
    clusters_file = config_file.with_name("clusters.json")
    clusters_file.unlink()
    if content is not None:
        clusters_file.write_text(content)
    assert check(config_file) == 1
    assert capsys.readouterr().err.startswith(f"{clusters_file}: ")


def test_a_cluster_that_is_not_listed_is_a_warning(
    config_file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Another source may have it, now or later; the line in tokenway.yaml is said, for it may be misspelt."""
    config_file.write_text("models:\n  llama:\n    rules: [{cluster: b}]\n")
    assert check(config_file) == 0
    place = "line 3: models.llama.rules[0].cluster: no cluster `b` in clusters.json; accepted: a"
    consequence = "requests for it get 503 until a source lists it"
    assert capsys.readouterr().err == f"{config_file}: warning: {place}; {consequence}\n"


def test_print_effective_writes_a_complete_file(
    config_file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The effective configuration is YAML with every default and nothing else."""
    assert check(config_file, print_effective=True) == 0
    out = capsys.readouterr().out
    assert "candidate_percent: 5" in out
    assert parse(out, "x") == parse(config_file.read_text(), "x")


@pytest.mark.parametrize(
    ("default", "is_warned"),
    [("a", True), ("same", True), ("web", False)],
)
def test_a_default_cluster_of_engines_is_a_warning(
    config_file: Path, default: str, is_warned: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    """The cluster of a model, or another with an engine of its, by name and in one line; exit status 0."""
    engine, other = '{"address": "10.0.0.1", "port": 8000}', '{"address": "10.0.0.2", "port": 80}'
    clusters = {"a": engine, "same": f"{other}, {engine}", "web": other}
    members = ", ".join(f'{{"name": "{name}", "endpoints": [{of}]}}' for name, of in clusters.items())
    (config_file.parent / "clusters.json").write_text(f'{{"clusters": [{members}]}}')
    config_file.write_text(f"default_cluster: {default}\n" + config_file.read_text())
    assert check(config_file) == 0
    err = capsys.readouterr().err
    assert (f"warning: default_cluster: `{default}` is a model's engines" in err) is is_warned
    assert len(err.splitlines()) == is_warned


@pytest.mark.parametrize(
    ("wanted", "is_warned"),
    [
        ({}, False),
        ({"gpu": "h200"}, False),
        ({"gpu": "h100", "zone": "a"}, False),
        ({"gpu": "h100,h200"}, False),
        ({"gpu": "h300"}, True),
        ({"GPU": "h200"}, True),
        ({"gpu": "h200", "zone": "b"}, True),
        ({"gpu": ""}, True),
    ],
)
def test_a_part_of_a_cluster_in_which_nothing_is_is_a_warning(
    config_file: Path, wanted: dict[str, str], is_warned: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    """Each request by such a rule would be 503, which nobody means."""
    labels = {"gpu": "h100,h200", "zone": "a"}
    clusters = json.loads(CLUSTERS)
    clusters["clusters"][0]["endpoints"][0]["labels"] = labels
    (config_file.parent / "clusters.json").write_text(json.dumps(clusters))
    rules = [{"cluster": "a"}, {"cluster": "a", "headers": {"x-a": "1"}, "subset": wanted}]
    config_file.write_text(json.dumps({"models": {"\u202em": {"rules": rules}}}))
    assert check(config_file) == 0
    err = capsys.readouterr().err
    assert ("models.\\x202em.rules[1].subset: no endpoint of `a` in clusters.json" in err) is is_warned
    assert "\u202e" not in err


def test_listening_in_the_open_is_a_warning(config_file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """What was asked for in so many words is still said aloud."""
    text = "server: {listen: ['0.0.0.0:1'], listen_insecure: true}\n"
    config_file.write_text(text + config_file.read_text())
    assert check(config_file) == 0
    assert "warning: server.listen_insecure" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("section", "files", "place"),
    [
        ("engine_tls: {{a: {{server_name: e, {}}}}}", "ca_file, cert_file, key_file", "engine_tls.a"),
        ("server: {{listen_tls: {{{}}}}}", "client_ca_file, key_file, cert_file", "server.listen_tls"),
        (
            "endpoint_picker: {{listen: ['127.0.0.1:1'], listen_tls: {{{}}}}}",
            "cert_file, key_file",
            "endpoint_picker.listen_tls",
        ),
        (
            "discovery: {{istio: {{address: 'i:1', tls: {{{}}}}}}}",
            "token_file, ca_file",
            "discovery.istio.tls",
        ),
    ],
)
def test_a_certificate_that_cannot_be_read_is_a_warning(
    config_file: Path, pki: Path, section: str, files: str, place: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """By its setting and the reason, once; of files that can be used nothing is said."""
    gone = config_file.with_name("gone.pem")
    *there, missing = files.split(", ")
    named = ", ".join([*(f"{name}: {pki / FILES[name]}" for name in there), f"{missing}: {gone}"])
    text = f"{section.format(named)}\nclusters_file: clusters.json\n"
    config_file.write_text(text + config_file.read_text())
    assert check(config_file) == 0
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"{config_file}: warning: {place}.{missing}: {gone}: No such file or directory; ")


def test_a_certificate_in_the_stores_url_that_cannot_be_used_is_a_warning(
    config_file: Path, pki: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """By the option of the URL; without another part of the URL, which may have a password."""
    gone, token = config_file.with_name("gone.pem"), pki / "token"
    url = f"rediss://:s3cret@h?certfile={token}&keyfile={pki / FILES['key_file']}&ca_certs={gone}"
    config_file.write_text(f"metadata_center: {{url: '{url}'}}\n{config_file.read_text()}")
    assert check(config_file) == 0
    said = capsys.readouterr().err
    unread, none = said.splitlines()
    place = f"{config_file}: warning: metadata_center.url: "
    assert unread.startswith(f"{place}ca_certs={gone}: No such file or directory; ")
    assert none.startswith(f"{place}certfile={token}, ")
    assert "s3cret" not in said


def test_a_certificate_in_the_stores_url_without_its_key_is_a_warning(
    config_file: Path, pki: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """One file may have both; a key alone is no option."""
    certificate, key = (pki / FILES[name] for name in ("cert_file", "key_file"))
    both = config_file.with_name("both.pem")
    both.write_text(certificate.read_text() + key.read_text())
    rest = config_file.read_text()
    for file, said in (
        (certificate, f"certfile={certificate}, {certificate}: no certificate and its key"),
        (both, ""),
    ):
        config_file.write_text(f"metadata_center: {{url: 'rediss://h?certfile={file}'}}\n{rest}")
        assert check(config_file) == 0
        warned = capsys.readouterr().err
        assert said in warned
        assert bool(warned) == bool(said)
    config_file.write_text(f"metadata_center: {{url: 'rediss://h?keyfile={key}'}}\n{rest}")
    assert check(config_file) == 1
    assert "metadata_center.url: keyfile goes with certfile" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("files", "key", "words"),
    [
        ({"ca_file": "token"}, "ca_file", "no certificate of a CA, in PEM"),
        ({"key_file": "ca.key"}, "cert_file", "no certificate and its key, without a passphrase: KEY_VALUES"),
        ({"cert_file": "token"}, "cert_file", "no certificate and its key"),
        ({"cert_file": "locked.pem", "key_file": "locked.key"}, "cert_file", "without a passphrase"),
    ],
)
def test_a_certificate_that_is_none_is_a_problem_of_engines_and_else_a_warning(
    config_file: Path,
    pki: Path,
    files: dict[str, str],
    key: str,
    words: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """A reload refuses `engine_tls` for it; what listens may be on another machine."""
    named = {name: str(pki / file) for name, file in {**FILES, **files}.items()}
    pair = f"cert_file: {named['cert_file']}, key_file: {named['key_file']}"
    listening = f"server: {{listen_tls: {{{pair}, client_ca_file: {named['ca_file']}}}}}\n"
    before = config_file.read_text()
    config_file.write_text(listening + before)
    assert check(config_file) == 0
    (warning,) = capsys.readouterr().err.splitlines()
    assert f"warning: server.listen_tls.{'client_' * (key == 'ca_file')}{key}: {named[key]}" in warning
    assert words in warning
    config_file.write_text(
        f"engine_tls: {{a: {{server_name: e, ca_file: {named['ca_file']}, {pair}}}}}\n{before}"
    )
    assert check(config_file) == 1
    (problem,) = capsys.readouterr().err.splitlines()
    assert problem.startswith(f"{config_file}: line 1: engine_tls.a.{key}: {named[key]}")
    assert words in problem


def test_addresses_that_are_no_engines_are_named(
    config_file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """What an engine prints that listens to all (`0.0.0.0`), and what no connection leads to."""
    endpoints = [
        {"address": address, "port": 1} for address in ("0.0.0.0", "::", "224.0.0.1", "ff02::1", "10.0.0.1")
    ]
    file = config_file.with_name("clusters.json")
    file.write_text(json.dumps({"clusters": [{"name": "a", "endpoints": endpoints}]}))
    assert check(config_file) == 0
    said = [line.partition("`a` has ")[2] for line in capsys.readouterr().err.splitlines()]
    assert said == [
        "an endpoint at 0.0.0.0, which is Tokenway's own machine",
        "an endpoint at ::, which is Tokenway's own machine",
        "an endpoint at 224.0.0.1, which no engine can have",
        "an endpoint at ff02::1, which no engine can have",
    ]


def test_names_do_not_reach_the_terminal(config_file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Controls in a model's name are shown, not obeyed."""
    config_file.write_text('models: {"a\\nb": {rules: [{cluster: a}]}}')
    assert check(config_file) == 0
    assert "(a\\x0ab)" in capsys.readouterr().out
