"""Every page of the admin port, one row each; a new page is a row here and the file that it names."""

from __future__ import annotations

from typing import Final

from extproc.admin.page import Page
from extproc.admin.pages.endpoints import ENDPOINTS
from extproc.admin.pages.explain import EXPLAIN, LAST
from extproc.admin.pages.health import HEALTHZ, READYZ
from extproc.admin.pages.metrics import METRICS

PAGES: Final[tuple[Page, ...]] = (METRICS, HEALTHZ, READYZ, ENDPOINTS, LAST, EXPLAIN)
