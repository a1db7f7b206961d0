"""What a real istiod makes of the gateway's listener where clients speak TLS: the bounds of handshakes.

The listener stays in Envoy's waiting room: pilot-agent, which would bring it the certificate, is not there.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from testbed.istio_proxy import Proxy, running_proxy
from testbed.istiod import running_istiod
from testbed.processes import eventually, free_port
from tests.istio.gateway import LABELS, NAMESPACE, on_loopback
from tokenway.cli.render import rendered

pytestmark = [pytest.mark.istio, pytest.mark.asyncio(loop_scope="session")]


async def listeners(proxy: Proxy) -> list[dict[str, Any]]:
    """That Envoy took, in use or not."""
    (dump,) = [
        each
        for each in (await proxy.config_dump())["configs"]
        if each["@type"].endswith(".ListenersConfigDump")
    ]
    states = [each.get("active_state") or each["warming_state"] for each in dump.get("dynamic_listeners", ())]
    return [state["listener"] for state in states]


async def test_half_a_handshake_is_bounded(tmp_path: Path) -> None:
    """The client's first word and the rest of the handshake, once each, by `headers_timeout_s`."""
    tls = {"cert_file": "/etc/edge/tls.crt", "key_file": "/etc/edge/tls.key"}
    config = {
        "version": 1,
        "server": {"run_dir": str(tmp_path)},
        "istio_gateway": {"port": free_port(), "hosts": ["llm.example.com"]},
        "edge": {"headers_timeout_s": 3, "tls": tls},
        "models": {"m": {"rules": [{"cluster": "m.models.internal:8000"}]}},
    }
    path = tmp_path / "tokenway.yaml"
    path.write_text(yaml.safe_dump(config))
    (tmp_path / "clusters.json").write_text('{"clusters": []}')
    async with (
        running_istiod(tmp_path / "istiod") as istiod,
        running_proxy(tmp_path / "proxy", istiod.port, labels=LABELS, namespace=NAMESPACE) as proxy,
    ):
        files = rendered(path)
        for name in sorted(files, key="gateway.yaml".__eq__):
            istiod.write(name, *map(on_loopback, files[name]))
        (listener,) = await eventually(
            lambda: listeners(proxy), lambda found: any("listener_filters_timeout" in each for each in found)
        )
        assert proxy.refused() == ""
    assert listener["listener_filters_timeout"] == "3s"
    assert [each["name"] for each in listener["listener_filters"]] == ["envoy.filters.listener.tls_inspector"]
    (chain,) = listener["filter_chains"]
    assert chain["transport_socket_connect_timeout"] == "3s"
    assert chain["transport_socket"]
