"""`tokenway check FILE`: is this configuration usable, and what does it amount to."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from typing import Final

from extproc.config.certificates import find_problems, unreadable
from extproc.config.clusters import ClusterSpec
from extproc.config.document import Location
from extproc.config.engine_files import problems_of
from extproc.config.loading import effective, read_all, read_once, unlisted
from extproc.config.notation import read_yaml
from extproc.config.schema import Config
from extproc.config.sections.fields import Section
from extproc.errors import ConfigError
from extproc.observing.printable import printable
from extproc.server.envoys.bootstrap import template, withheld
from extproc.server.listening.run_dir import home_of
from extproc.values.endpoints import carries
from metadata_center.addresses import is_of_many, is_unspecified
from metadata_center.sharing.redis_url import parse_url

_TO_READ: Final = "Tokenway has to read it where it runs"


def check(path: Path, *, print_effective: bool = False) -> int:
    """Check a tokenway.yaml with its clusters file, or a clusters.json alone.

    Args:
        path: The file, or an open pipe; `.json` means a clusters.json.
        print_effective: Write the configuration with every default to standard output instead of
            the summary.

    Returns:
        Exit status: 0 if usable; 1 if not, with the problems on standard error, one per line.
    """
    try:
        read = cache(read_once)  # a pipe can be read but once
        config, clusters = read_all(path, read)
        _refuse_certificates(path, read, config)
        home_of(config, path)
        warned = [*_unlisted(path, read, config, clusters), *warnings(config, clusters)]
    except ConfigError as error:
        for problem in error.problems:
            print(printable(f"{error.path}: {problem}"), file=sys.stderr)
        return 1
    if print_effective:
        print(effective(config), end="")
        return 0
    withheld_headers = withheld(template(), config.rule_headers())
    if withheld_headers:
        print(
            f"{path}: warning: rules match {', '.join(withheld_headers)}: Envoy forwards this only if its "
            "bootstrap was rendered (tokenway bootstrap) since those rules were written",
            file=sys.stderr,
        )
    print(f"{path}: ok")
    print(printable(f"  models:    {len(config.models)} ({', '.join(config.models) or 'none'})"))
    print(f"  clusters:  {len(clusters)} ({', '.join(cluster.name for cluster in clusters) or 'none'})")
    print(f"  endpoints: {sum(len(cluster.endpoints) for cluster in clusters)}")
    for warning in warned:
        print(printable(f"{path}: warning: {warning}"), file=sys.stderr)
    return 0


def _unlisted(
    path: Path, read: Callable[[Path], str], config: Config, clusters: Sequence[ClusterSpec]
) -> list[str]:
    if path.suffix == ".json":
        return []
    document = read_yaml(read(path), str(path))
    consequence = "requests for it get 503 until a source lists it"
    return [f"{place}; {consequence}" for place in unlisted(config, clusters, document)]


def warnings(config: Config, clusters: Sequence[ClusterSpec]) -> list[str]:
    """What is allowed and seldom meant, one sentence each."""
    found: list[str] = []
    places = {
        cluster.name: {(endpoint.address, endpoint.port) for endpoint in cluster.endpoints}
        for cluster in clusters
    }
    default = config.default_cluster
    if default is not None:
        engines = {rule.cluster for model in config.models.values() for rule in model.rules}
        if default in engines or any(
            places.get(default, set()) & places[name] for name in engines if name in places
        ):
            found.append(
                f"default_cluster: `{default}` is a model's engines: whatever path is no inference reaches "
                "them as it came, but for those by which they are administered (docs/security.md)"
            )
    found += _odd_addresses(clusters)
    found += _subsets_of_nothing(config, clusters)
    if config.server.listen_insecure and config.server.listen_tls is None:
        found.append(
            "server.listen_insecure: hosts that reach server.listen steer traffic, read prompts and eject "
            "engines; use server.listen_tls"
        )
    return [*found, *_unusable(config)]


def _refuse_certificates(path: Path, read: Callable[[Path], str], config: Config) -> None:
    """Raise ConfigError for files of `engine_tls` that are here and not what they should be."""
    found: list[tuple[Location, str]] = [
        (("engine_tls", cluster, problem.key), problem.text)
        for cluster, tls in config.engine_tls.items()
        for problem in problems_of(tls)
        if not problem.is_unreadable
    ]
    if found:
        raise ConfigError(str(path), read_yaml(read(path), str(path)).located(found))


def _unusable(config: Config) -> list[str]:
    """Files of TLS that Tokenway itself reads, and cannot use here; Envoy's own may be on another machine."""
    sections: dict[str, Section | None] = {
        "server.listen_tls": config.server.listen_tls,
        "endpoint_picker.listen_tls": config.endpoint_picker and config.endpoint_picker.listen_tls,
        "discovery.istio.tls": config.discovery.istio and config.discovery.istio.tls,
        **{f"engine_tls.{cluster}": tls for cluster, tls in config.engine_tls.items()},
    }
    found: list[str] = []
    for name, section in sections.items():
        files = {key: value for key, value in section or () if key.endswith("_file")}
        pair = files.pop("cert_file", None), files.pop("key_file", None)
        token = files.pop("token_file", None)
        problems = find_problems([*files.items()], *pair)
        if token is not None and (unread := unreadable("token_file", token)) is not None:
            problems.append(unread)
        found += [f"{name}.{problem.key}: {problem.text}; {_TO_READ}" for problem in problems]
    return [*found, *_unusable_of_store(config.metadata_center.url)]


def _unusable_of_store(url: str | None) -> list[str]:
    """The same of the files in the store's URL; nothing else of it is shown."""
    if url is None or not url.startswith("rediss"):
        return []
    tls = parse_url(url).tls or {}
    authority, certificate, key = (tls[f"ssl_{name}"] for name in ("ca_certs", "certfile", "keyfile"))
    options = {"cert_file": "certfile", "key_file": "keyfile"}
    return [
        f"metadata_center.url: {options.get(problem.key, problem.key)}={problem.text}; {_TO_READ}"
        for problem in find_problems([("ca_certs", authority)], certificate, key or certificate)
    ]


def _subsets_of_nothing(config: Config, clusters: Sequence[ClusterSpec]) -> list[str]:
    """Rules for a part of a cluster in which no endpoint is."""
    listed = {cluster.name: cluster.endpoints for cluster in clusters if cluster.endpoints}
    return [
        f"models.{name}.rules[{i}].subset: no endpoint of `{rule.cluster}` in {config.clusters_file} has "
        f"these labels; requests get 503 until a source lists one"
        for name, model in config.models.items()
        for i, rule in enumerate(model.rules)
        if rule.cluster in listed
        and not any(carries(endpoint.labels, rule.subset) for endpoint in listed[rule.cluster])
    ]


def _odd_addresses(clusters: Sequence[ClusterSpec]) -> list[str]:
    """Endpoints at addresses that are no engine's, such as what an engine prints that listens to all."""
    return [
        f"clusters: `{cluster.name}` has an endpoint at {endpoint.address}, which "
        + ("is Tokenway's own machine" if is_unspecified(endpoint.address) else "no engine can have")
        for cluster in clusters
        for endpoint in cluster.endpoints
        if is_unspecified(endpoint.address) or is_of_many(endpoint.address)
    ]
