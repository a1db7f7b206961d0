"""Ports for the page of metrics alone, where an endpoint picker's deployment looks for it."""

from __future__ import annotations

from extproc.admin.pages.metrics import METRICS
from extproc.config.schema import Config
from extproc.server.listening.admin_answers import Answering
from extproc.server.listening.admin_port import AdminPort, TcpPlace
from extproc.server.parts import Part
from metadata_center.addresses import Address


def metrics_ports(config: Config, answering: Answering) -> list[Part]:
    """Those that `endpoint_picker.metrics_listen` asks for, as parts of the process that answers."""
    listen = () if config.endpoint_picker is None else config.endpoint_picker.metrics_listen
    places = [Address.parse(each) for each in listen]
    ports = [AdminPort((METRICS,), answering, TcpPlace(place.host, place.port)) for place in places]
    return [Part("metrics", port.start, port.stop) for port in ports]
