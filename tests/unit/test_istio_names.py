"""Names of clusters as istiod makes them."""

from __future__ import annotations

import pytest

from extproc.istio_gateway.names import Destination, destination_of


@pytest.mark.parametrize(
    ("name", "destination"),
    [
        ("outbound|8000||llama.models.internal", Destination("llama.models.internal", 8000)),
        ("outbound|8000|h200|llama.models.internal", Destination("llama.models.internal", 8000, "h200")),
        ("vllm.ml.svc.cluster.local:80", Destination("vllm.ml.svc.cluster.local", 80)),
    ],
)
def test_both_forms_are_read(name: str, destination: Destination) -> None:
    """Istio's own, and the short one that rules may have; both are the same cluster."""
    assert destination_of(name) == destination
    assert destination_of(destination.cluster) == destination
    assert destination.whole == Destination(destination.host, destination.port)


@pytest.mark.parametrize(
    "name",
    [
        *(
            "llama",
            "llama:8000",
            "llama.models.internal",
            "llama.models.internal:0",
            "llama.models.internal:65536",
        ),
        *(
            "inbound|8000||",
            "outbound|8000||",
            "outbound|x||a.b",
            "outbound|1|a b|c.d",
            "outbound|1||a..b",
            ":80",
        ),
        *("outbound_.8000_._.llama.models.internal", "10.0.0.1:", "*.models.internal:80", ""),
    ],
)
def test_what_is_no_name_of_istios_is_none(name: str) -> None:
    """A host without a dot is one of them: Istio would take it for a Kubernetes service."""
    assert destination_of(name) is None
