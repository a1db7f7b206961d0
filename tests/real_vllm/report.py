"""Prints, per request, what running gateways foresaw and what their engines reported.

    python -m tests.real_vllm.report http://127.0.0.1:10080 [http://127.0.0.1:10081 ...] [--last N]

One row per request, oldest first; the last line is one JSON object with the sums.
"""

from __future__ import annotations

import argparse
import asyncio
import json
from collections.abc import Sequence

from testbed.processes import get_json
from tests.real_vllm.accuracy import Foreseen, cached_summary, foreseen, ttft_summary

HEADINGS = ("request", "model", "prompt", "predicted cached", "cached", "predicted TTFT ms", "TTFT ms")


def table(rows: Sequence[Foreseen]) -> str:
    """The rows in columns, under headings."""

    def milliseconds(seconds: float | None) -> str:
        return "-" if seconds is None else f"{1e3 * seconds:.1f}"

    cells = [HEADINGS] + [
        (
            row.request_id,
            row.model,
            str(row.prompt_tokens),
            str(row.predicted_cached_tokens),
            str(row.cached_tokens),
            milliseconds(row.predicted_ttft_s),
            milliseconds(row.ttft_s),
        )
        for row in rows
    ]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    return "\n".join("  ".join(map(str.rjust, line, widths)) for line in cells)


async def main() -> None:
    """Ask the gateways named on the command line."""
    parser = argparse.ArgumentParser(description="What gateways foresaw and what their engines reported.")
    parser.add_argument("admin_urls", nargs="+", metavar="ADMIN_URL")
    parser.add_argument("--last", type=int, default=500, help="decisions asked of each gateway")
    options = parser.parse_args()
    rows = []
    for url in options.admin_urls:
        records = (await get_json(f"{url.rstrip('/')}/explain?last={options.last}"))["records"]
        rows += foreseen(reversed(records))
    print(table(rows))
    print(json.dumps({"cached_tokens": cached_summary(rows), "ttft": ttft_summary(rows)}))


if __name__ == "__main__":
    asyncio.run(main())
