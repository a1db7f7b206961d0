"""Control planes that list endpoints, beside the clusters file."""

from __future__ import annotations

from typing import Annotated, Self

from pydantic import AfterValidator, Field, model_validator
from pydantic_core import PydanticCustomError

from extproc.config.sections.fields import FileName, Labels, Seconds, Section
from extproc.config.sections.kubernetes import KubernetesDiscovery
from metadata_center.addresses import Address


def _target(text: str) -> str:
    try:
        Address.parse(text, lowest_port=1)
    except ValueError:
        raise PydanticCustomError(
            "target", "not an address; accepted: text like `istiod.istio-system.svc:15012`, `127.0.0.1:15010`"
        ) from None
    return text


class IstioTls(Section):
    """TLS to istiod: its port 15012."""

    ca_file: FileName
    """PEM file of the CA that signed istiod's certificate; read again for each connection."""
    token_file: FileName | None = None
    """File of the service account's token, for the audience istio-ca; read again for each connection."""
    cert_file: FileName | None = None
    """PEM file of the certificate that istiod is shown, with those between it and the root; with key_file."""
    key_file: FileName | None = None
    """PEM file of its private key, without a passphrase; both are read again for each connection."""
    server_name: Annotated[str, Field(pattern=r"^[A-Za-z0-9._-]{1,253}$")] | None = None
    """DNS name in istiod's certificate; null takes the host of `address`."""

    @model_validator(mode="after")
    def _pair(self) -> Self:
        if (self.cert_file is None) != (self.key_file is None):
            raise PydanticCustomError("half_tls", "accepted: both cert_file and key_file, or neither")
        return self


class IstioDiscovery(Section):
    """Endpoints from istiod, by delta ADS."""

    address: Annotated[str, AfterValidator(_target), Field(max_length=512, examples=["127.0.0.1:15010"])]
    """Where istiod listens: port 15010 in clear text, 15012 with `tls`."""
    tls: IstioTls | None = None
    """TLS; null speaks clear text: who can pretend to be istiod says where requests go."""
    namespace: Annotated[str, Field(pattern=r"^[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?$")] = "default"
    """Namespace that istiod takes this gateway to be in: what is exported to it is seen."""
    labels: Labels = Field(default_factory=dict)
    """Labels that istiod takes this gateway to have."""
    cluster_id: Annotated[str, Field(pattern=r"^[A-Za-z0-9._-]{1,128}$")] = "Kubernetes"
    """What istiod calls the Kubernetes cluster of this gateway (its `--clusterID`)."""


class Discovery(Section):
    """Control planes that list endpoints, beside the clusters file. Changes need a restart."""

    istio: IstioDiscovery | None = None
    """Endpoints from Istio; null asks no istiod."""
    kubernetes: KubernetesDiscovery | None = None
    """Endpoints from the Kubernetes API; null does not ask it."""
    wait_s: Seconds = 10.0
    """Longest that a start waits for what control planes list, in seconds; it then serves without."""

    @property
    def is_on(self) -> bool:
        """Some control plane lists endpoints."""
        return self.istio is not None or self.kubernetes is not None
