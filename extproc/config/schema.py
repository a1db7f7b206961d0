"""What tokenway.yaml may say: every section, by its name, with its default and meaning."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import Field, field_validator
from pydantic_core import PydanticCustomError

from extproc.config.sections.discovery import Discovery
from extproc.config.sections.edge import Away, Edge
from extproc.config.sections.engines import Cache, EngineTls, Health
from extproc.config.sections.fields import AdminPath, ClusterName, Name, Section
from extproc.config.sections.istio import IstioGateway
from extproc.config.sections.listening import EndpointPicker, Server
from extproc.config.sections.models import Model
from extproc.config.sections.observing import Explain, Logging
from extproc.config.sections.requests import Holding, Load, RequestSection, Responses, Signals
from extproc.config.sections.sharing import MetadataCenter
from extproc.request.rules import ModelRules, Rule


class Config(Section):
    """Configuration of a Tokenway gateway (tokenway.yaml)."""

    version: Literal[1] = 1
    """Version of this format."""
    server: Server = Server()
    """The processes and where they listen."""
    endpoint_picker: EndpointPicker | None = None
    """The endpoint-picker protocol of the Gateway API; null does not serve it."""
    clusters_file: Name = "clusters.json"
    """Clusters and their endpoints; relative to this file. With `discovery`, read only if given here."""
    discovery: Discovery = Discovery()
    """Control planes that list endpoints as well."""
    default_cluster: ClusterName | None = None
    """Cluster for paths that are no inference API; null answers 404."""
    default_cluster_admin_paths: Annotated[tuple[AdminPath, ...], Field(strict=False)] = ()
    """Paths by which engines are administered (docs/security.md) that may pass to it after all."""
    request: RequestSection = RequestSection()
    """What a client may send."""
    signals: Signals = Signals()
    """When a request counts as answered, and when it is given up."""
    load: Load = Load()
    """The table of in-flight requests."""
    health: Health = Health()
    """Which endpoints may be chosen."""
    explain: Explain = Explain()
    """Decision records."""
    metadata_center: MetadataCenter = MetadataCenter()
    """Load and caches, shared with other gateways."""
    cache: Cache = Cache()
    """The estimate of prefix caches."""
    responses: Responses = Responses()
    """Stored responses."""
    holding: Holding = Holding()
    """Late binding."""
    away: Away = Away()
    """What goes on without Tokenway."""
    edge: Edge = Edge()
    """Envoy towards clients."""
    istio_gateway: IstioGateway | None = None
    """Envoy is an Istio gateway; null means our own, by `tokenway bootstrap`."""
    engine_tls: Mapping[Name, EngineTls] = Field(default_factory=dict)
    """TLS to engines, by cluster; clusters left out are reached in clear text."""
    logging: Logging = Logging()
    """Logs."""
    reasoning_split: Literal[False] = False
    """Not done here: tokens do not pass through Tokenway; use the engine flag (vLLM: --reasoning-parser)."""
    models: Mapping[Name, Model] = Field(default_factory=dict)
    """Models by name; none at all means one model per cluster of clusters_file."""

    @field_validator("reasoning_split", mode="before")
    @classmethod
    def _engines_split_reasoning(cls, value: Any) -> Any:
        if value is True:
            raise PydanticCustomError(
                "reasoning_split",
                "tokens do not pass through Tokenway, so it cannot split reasoning from the answer: "
                "start the engine with its own flag instead (vLLM: --reasoning-parser); accepted: false",
            )
        return value

    def rule_headers(self) -> frozenset[str]:
        """Request headers that some rule matches, lower case."""
        return frozenset(
            name for model in self.models.values() for rule in model.rules for name in rule.headers
        )

    def clusters_named(self) -> frozenset[str]:
        """Clusters that rules, `default_cluster` or `engine_tls` name, whether any source has them or not."""
        named = {rule.cluster for model in self.models.values() for rule in model.rules}
        default = () if self.default_cluster is None else (self.default_cluster,)
        return frozenset(named.union(self.engine_tls, default))

    def rules(self) -> tuple[ModelRules, ...]:
        """All models as `RuleTable` takes them."""
        return tuple(
            ModelRules(
                name=name,
                aliases=model.aliases,
                rules=tuple(Rule(**rule.model_dump()) for rule in model.rules),
                load_balancing=model.load_balancing.settings(),
            )
            for name, model in self.models.items()
        )
