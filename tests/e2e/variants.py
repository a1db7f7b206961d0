"""How end-to-end tests are run besides as they are: by which variables, and which files.

A stage of `.ci/run` runs each; `tests/test_stages.py` holds it to that.
"""

from __future__ import annotations

from typing import Final

ISTIO_PROFILE: Final = frozenset(
    {
        "answers",
        "answers_without_errors",
        "compressed_requests",
        "errors",
        "fairness",
        "framing",
        "gateway_failures",
        "half_requests",
        "http2_clients",
        "large_bodies",
        "messages_errors",
        "observing",
        "rule_headers",
        "shared_load",
        "small_apis",
        "steering",
        "streams",
        "transport",
        "usage",
    }
)
"""Files, without `test_`, whose stacks `TOKENWAY_PROFILE=istio` configures as an Istio gateway's. Others say
something of our own bootstrap, or start no stack of the harness; by the profile they are left out.
"""

GRPCIO: Final = frozenset(
    {
        "answers",
        "endpoint_picker",
        "framing",
        "gateway_failures",
        "large_bodies",
        "picker_requests",
        "reload",
        "streams",
    }
)
"""Files that a stage runs by `TOKENWAY_TRANSPORT=grpcio` as well."""
