"""How a configuration names services of a mesh, and what it says of istiod."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

import pytest

from extproc.config.loading import parse, read_all, unlisted
from extproc.config.notation import read_yaml
from extproc.errors import ConfigError
from tests.mesh import HOST, SERVICE

ISTIO = 'discovery: {istio: {address: "127.0.0.1:15010"}}\n'
RULES = f"""
default_cluster: web.internal:80
engine_tls: {{"{HOST}:8000": {{ca_file: ca.pem, server_name: x}}}}
models:
  llama: {{rules: [{{cluster: "{HOST}:8000"}}, {{cluster: "outbound|8000||{HOST}"}}, {{cluster: files}}]}}
"""
CLUSTERS = '{"clusters": [{"name": "files", "endpoints": []}, {"name": "web.internal:80", "endpoints": []}]}'


def reading(files: Mapping[str, str]) -> Callable[[Path], str]:
    """Of files that are not there."""

    def read(path: Path) -> str:
        if path.name not in files:
            raise ConfigError(str(path), ["cannot be read"])
        return files[path.name]

    return read


def test_host_and_port_are_the_service() -> None:
    """In rules, as default cluster, in `engine_tls`; other names stay as they are."""
    config, clusters = read_all(Path("t.yaml"), reading({"t.yaml": ISTIO + RULES}))
    assert clusters == ()
    assert [rule.cluster for rule in config.models["llama"].rules] == [SERVICE, SERVICE, "files"]
    assert config.default_cluster == "outbound|80||web.internal"
    assert list(config.engine_tls) == [SERVICE]
    assert config.clusters_named() == {SERVICE, "files", "outbound|80||web.internal"}
    text = ISTIO + RULES
    problems = unlisted(config, clusters, read_yaml(text, "x"))
    assert [problem for problem in problems if "outbound" in problem] == []
    assert ["`files`" in problem for problem in problems] == [True]


def test_what_the_clusters_file_lists_is_its_own() -> None:
    """A cluster may be called like a host and a port; without Istio every name is only that."""
    named = ISTIO + "clusters_file: c.json\n" + RULES
    config, clusters = read_all(Path("t.yaml"), reading({"t.yaml": named, "c.json": CLUSTERS}))
    assert config.default_cluster == "web.internal:80"
    assert len(clusters) == 2
    plain, _ = read_all(Path("t.yaml"), reading({"t.yaml": RULES, "clusters.json": CLUSTERS}))
    assert plain.models["llama"].rules[0].cluster == f"{HOST}:8000"


def test_a_clusters_file_is_needed_where_it_is_named() -> None:
    """And where no control plane lists anything."""
    for text in (ISTIO + "clusters_file: c.json\n", "version: 1\n"):
        with pytest.raises(ConfigError):
            read_all(Path("t.yaml"), reading({"t.yaml": text}))


@pytest.mark.parametrize(
    ("istio", "problem"),
    [
        ("{}", "address"),
        ("{address: istiod}", "discovery.istio.address: not an address; accepted: text like `istiod."),
        ("{address: 'istiod:0'}", "discovery.istio.address: not an address"),
        ("{address: 'a:1', namespace: A_b}", "discovery.istio.namespace: malformed"),
        ("{address: 'a:1', tls: {}}", "discovery.istio.tls.ca_file"),
        ("{address: 'a:1', token: x}", "token"),
        (
            "{address: 'a:1', tls: {ca_file: ca.pem, cert_file: c.pem}}",
            "discovery.istio.tls: accepted: both cert_file and key_file, or neither",
        ),
    ],
)
def test_what_cannot_be_is_said_with_its_key(istio: str, problem: str) -> None:
    """Before anything is connected to."""
    with pytest.raises(ConfigError) as refused:
        parse(f"discovery: {{istio: {istio}}}\n", "t.yaml")
    assert any(problem in line for line in refused.value.problems), refused.value.problems
