"""Settings of TLS as Istio has them."""

from __future__ import annotations

from extproc.config.sections.edge import EdgeTls
from extproc.config.sections.engines import EngineTls
from extproc.istio_gateway.text import Manifest


def client_tls(credential: str | None, tls: EdgeTls | None) -> Manifest:
    """Of a Gateway's server: by a secret, or else by files in the gateway's pods."""
    mutual = tls is not None and tls.client_ca_file is not None
    settings: Manifest = {"mode": "MUTUAL" if mutual else "SIMPLE", "minProtocolVersion": "TLSV1_2"}
    if credential is not None:
        return {**settings, "credentialName": credential}
    assert tls is not None
    settings |= {"serverCertificate": tls.cert_file, "privateKey": tls.key_file}
    return settings | ({"caCertificates": tls.client_ca_file} if mutual else {})


def engine_tls(tls: EngineTls) -> Manifest:
    """Of a DestinationRule's connections to engines."""
    settings: Manifest = {
        "mode": "SIMPLE" if tls.cert_file is None else "MUTUAL",
        "caCertificates": tls.ca_file,
        "sni": tls.server_name,
        "subjectAltNames": [tls.server_name],
    }
    if tls.cert_file is not None:
        settings |= {"clientCertificate": tls.cert_file, "privateKey": tls.key_file}
    return settings
