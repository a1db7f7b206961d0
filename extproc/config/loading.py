"""tokenway.yaml and the clusters.json beside it: text to `Config`, and back.

Only `load_all`, `read_file` and `read_once` read files. Everything else here is pure but for the
reading that `read_all` is given.
"""

from __future__ import annotations

from codecs import BOM_UTF8
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any, BinaryIO, Final

import yaml

from extproc.config.clusters import MAX_CLUSTERS, ClusterSpec, parse_clusters
from extproc.config.collisions import collisions
from extproc.config.document import MAX_PROBLEMS, Document, Location, unknown, without_passwords
from extproc.config.notation import read_yaml
from extproc.config.rule_headers import Edge, never_arrives, never_said
from extproc.config.schema import Config
from extproc.config.sections.kubernetes import KubernetesDiscovery
from extproc.config.sections.models import Model, RuleSection
from extproc.errors import ConfigError
from extproc.values.mesh_names import MeshName
from extproc.values.requests import ANY_MODEL
from metadata_center.files import is_descriptor, open_piped, open_regular

MAX_FILE_BYTES = 16 * 1024 * 1024
"""Bound on a file: four thousand endpoints with labels have 1 MB."""

Settings = Mapping[str, Any]
"""A part of a tokenway.yaml, in plain data; what flags of the command say."""

MAX_NAMES: Final = MAX_CLUSTERS
"""Of models and aliases: as many as clusters, which may each have a model. Envoy gets a cluster for each."""

MAX_RULES: Final = 4 * MAX_NAMES
"""Of all models together."""

NO_SETTINGS: Settings = MappingProxyType({})


def load_all(path: Path, settings: Settings = NO_SETTINGS) -> tuple[Config, tuple[ClusterSpec, ...]]:
    """Read a tokenway.yaml and its clusters file, or a clusters.json alone (`.json`) with all defaults.

    Args:
        path: The file.
        settings: What goes before what it says, as a part of a tokenway.yaml.

    Returns:
        The configuration with its models filled in (`with_defaults`) and its names in full
        (`with_full_names`), and the clusters. Where control planes list endpoints, a clusters file is read
        only if `clusters_file` names one.

    Raises:
        ConfigError: Either file cannot be read or has problems, or they do not fit together.
    """
    return read_all(path, read_file, settings)


def read_all(
    path: Path, read: Callable[[Path], str], settings: Settings = NO_SETTINGS
) -> tuple[Config, tuple[ClusterSpec, ...]]:
    """`load_all` with a reading of one's own, which is asked for each file that is needed, once and in order.

    Args:
        path: As for `load_all`.
        read: The text of a file; raises `ConfigError` if it cannot be read.
        settings: As for `load_all`.
    """
    clusters: tuple[ClusterSpec, ...] = ()
    if path.suffix == ".json":
        clusters = parse_clusters(read(path), str(path))
        alone = read_yaml("", str(path)).overlaid({**settings, "clusters_file": path.name})
        return with_defaults(_valid(alone), clusters), clusters
    text = read(path)
    config = parse(text, str(path), settings)
    if not config.discovery.is_on or "clusters_file" in config.model_fields_set:
        clusters_file = clusters_path(config, path)
        clusters = parse_clusters(read(clusters_file), str(clusters_file))
    return with_full_names(with_defaults(config, clusters), clusters), clusters


def parse(text: str, path: str, settings: Settings = NO_SETTINGS) -> Config:
    """The configuration in a YAML text; an empty text is all defaults.

    Args:
        text: The whole file.
        path: Its name, for messages only.
        settings: As for `load_all`.

    Raises:
        ConfigError: With every problem, each as "line N: key: what is wrong; accepted: ...".
    """
    document = read_yaml(text, path).overlaid(settings)
    if isinstance(document.data, dict) and list(document.data) == ["clusters"]:
        document.refuse([(("clusters",), "this is a clusters file: give it a name that ends in .json")])
    return _valid(document)


def _valid(document: Document) -> Config:
    models = document.data.get("models") if isinstance(document.data, dict) else None
    if isinstance(models, dict) and len(models) > MAX_NAMES:  # more than is worth looking at one by one
        document.refuse([(("models",), _too_many_names(len(models)))])
    config = document.validated(Config)
    problems = [
        *_too_many(config),
        *_names_given_twice(config),
        *_headers_that_never_arrive(config),
        *collisions(config),
    ]
    if problems:
        document.refuse(problems)
    return config


def clusters_path(config: Config, path: Path) -> Path:
    """Where `clusters_file` of the tokenway.yaml at `path` is; a piped one is in the working directory."""
    return (Path() if is_descriptor(path) else path.parent) / config.clusters_file


def unlisted(config: Config, clusters: Sequence[ClusterSpec], document: Document) -> list[str]:
    """Each place that names a cluster which the clusters file does not have: another source may.

    Services of a mesh are left out where Istio lists endpoints.

    Args:
        config: From `read_all`.
        clusters: What the clusters file has.
        document: The text `config` came from (`read_yaml`), for the lines.
    """
    names = [*(cluster.name for cluster in clusters), *_of_kubernetes(config)]
    places: list[tuple[Location, str | None]] = [(("default_cluster",), config.default_cluster)]
    places += [(("engine_tls", name), name) for name in config.engine_tls]
    for model_name, model in config.models.items():
        for i, rule in enumerate(model.rules):
            places.append((("models", model_name, "rules", i, "cluster"), rule.cluster))
    listed = set(names)
    found = [
        (location, name)
        for location, name in places
        if name is not None and name not in listed and not _is_of_mesh(config, name)
    ]
    problems = [
        (location, f"no cluster `{name}` in {config.clusters_file}{unknown(name, names)}")
        for location, name in found[:MAX_PROBLEMS]
    ]
    return document.located(problems, len(found))


def with_defaults(config: Config, clusters: Sequence[ClusterSpec]) -> Config:
    """Fill in the models of a configuration that names none: one per cluster.

    The model is called what the cluster's `model` says or, failing that, like the cluster. Clusters of
    the same model become rules of equal weight. An InferencePool, or the only cluster that there is from
    Kubernetes and the file together, serves every model and, unless that is said, all other paths.
    """
    if config.models:
        return config
    rules: dict[str, list[RuleSection]] = {}
    for cluster in clusters:
        rules.setdefault(cluster.model or cluster.name, []).append(RuleSection(cluster=cluster.name))
    listed = _of_kubernetes(config)
    for_all = listed[0] if _is_for_all(config.discovery.kubernetes, clusters) else None
    for name in listed:
        model = ANY_MODEL if name == for_all else name
        rules.setdefault(model, []).append(RuleSection(cluster=name))
    models = {name: Model(rules=tuple(of_model)) for name, of_model in rules.items()}
    default = config.default_cluster or for_all
    return config.model_copy(update={"models": models, "default_cluster": default})


def _of_kubernetes(config: Config) -> tuple[str, ...]:
    """Clusters that Kubernetes lists."""
    kubernetes = config.discovery.kubernetes
    return () if kubernetes is None else kubernetes.clusters()


def _is_for_all(kubernetes: KubernetesDiscovery | None, clusters: Sequence[ClusterSpec]) -> bool:
    """The first cluster of Kubernetes serves what no other does."""
    if kubernetes is None:
        return False
    return kubernetes.pool is not None or (not clusters and len(kubernetes.clusters()) == 1)


def with_full_names(config: Config, clusters: Sequence[ClusterSpec]) -> Config:
    """Where Istio lists endpoints or is the gateway: `host:port` for a cluster is the service of that name.

    Names that the clusters file lists stay as they are.
    """
    if config.discovery.istio is None and config.istio_gateway is None:
        return config
    listed = {cluster.name for cluster in clusters}.union(_of_kubernetes(config))

    def full(name: str) -> str:
        found = None if name in listed else MeshName.of(name)
        return name if found is None else str(found)

    def full_rules(model: Model) -> Model:
        rules = tuple(rule.model_copy(update={"cluster": full(rule.cluster)}) for rule in model.rules)
        return model.model_copy(update={"rules": rules})

    default = config.default_cluster
    return config.model_copy(
        update={
            "default_cluster": None if default is None else full(default),
            "engine_tls": {full(name): tls for name, tls in config.engine_tls.items()},
            "models": {name: full_rules(model) for name, model in config.models.items()},
        }
    )


def effective(config: Config) -> str:
    """The configuration as YAML with every default written out; `parse` gives the same back.

    But for the passwords in the store's URL, which are not shown.
    """
    document = config.model_dump(mode="json")
    url = config.metadata_center.url
    if url is not None:
        document["metadata_center"]["url"] = without_passwords(url)
    text: str = yaml.safe_dump(document, sort_keys=False, allow_unicode=True)
    return text


def json_schema() -> dict[str, Any]:
    """The JSON schema of tokenway.yaml, published as etc/tokenway.schema.json."""
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **Config.model_json_schema()}


def _is_of_mesh(config: Config, name: str) -> bool:
    return config.discovery.istio is not None and MeshName.of(name) is not None


def _too_many(config: Config) -> list[tuple[Location, str]]:
    names = sum(1 + len(model.aliases) for model in config.models.values())
    rules = sum(len(model.rules) for model in config.models.values())
    texts = [_too_many_names(names)] if names > MAX_NAMES else []
    texts += [f"{rules} rules; accepted: at most {MAX_RULES}"] if rules > MAX_RULES else []
    return [(("models",), text) for text in texts]


def _too_many_names(names: int) -> str:
    return f"{names} names of models and aliases; accepted: at most {MAX_NAMES}"


def _names_given_twice(config: Config) -> list[tuple[Location, str]]:
    problems: list[tuple[Location, str]] = []
    owners = {name: name for name in config.models}
    for model_name, model in config.models.items():
        for i, alias in enumerate(model.aliases):
            if alias == ANY_MODEL:
                text = f"`{alias}` stands for names that no model has; accepted: a model of that name"
                problems.append((("models", model_name, "aliases", i), text))
            owner = owners.setdefault(alias, model_name)
            if owner != model_name or alias in model.aliases[:i] or alias == model_name:
                text = f"`{alias}` already names the model `{owner}`; accepted: names not in use"
                problems.append((("models", model_name, "aliases", i), text))
    return problems


def _headers_that_never_arrive(config: Config) -> list[tuple[Location, str]]:
    edge = Edge.OWN if config.istio_gateway is None else Edge.ISTIO
    if config.endpoint_picker is not None:
        edge = Edge.FOREIGN
    problems: list[tuple[Location, str]] = []
    for model_name, model in config.models.items():
        for i, rule in enumerate(model.rules):
            place = ("models", model_name, "rules", i, "headers")
            for name, value in rule.headers.items():
                problem = never_arrives(name, config.request.allow_headers, edge)
                if problem is not None:
                    problems.append((place, problem))
                elif (problem := never_said(value)) is not None:
                    problems.append(((*place, name), problem))
    return problems


def read_file(path: Path) -> str:
    """The text of a file, without the byte order mark that Windows editors begin it with.

    Raises:
        ConfigError: It is missing, no regular file, closed to us, too large, or not UTF-8.
    """
    return _text(path, open_regular)


def read_once(path: Path) -> str:
    """As `read_file`, and a pipe that is open already (`<(...)`, standard input) to its end; may wait."""
    return _text(path, open_piped)


def _text(path: Path, opened: Callable[[Path], BinaryIO]) -> str:
    try:
        with opened(path) as file:
            content = file.read(MAX_FILE_BYTES + 1)
        if len(content) > MAX_FILE_BYTES:
            raise OSError(f"too large; accepted: {MAX_FILE_BYTES} bytes")
        return content.removeprefix(BOM_UTF8).decode()
    except OSError as error:
        raise ConfigError(str(path), [f"cannot be read: {error.strerror or error}"]) from error
    except UnicodeDecodeError as error:
        raise ConfigError(str(path), [f"cannot be read: not UTF-8 at byte {error.start}"]) from error
