"""`tokenway explain`: why a request went where it went, asked of a running gateway's admin port."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from http.client import HTTPException
from urllib.error import HTTPError
from urllib.parse import quote

import orjson

from extproc.observing.explain import render
from extproc.observing.printable import escaped_json
from tokenway.cli.admin_answer import fetch
from tokenway.cli.admin_url import ADMIN_HELP, UNREADABLE, default_admin, foreign


def explain(args: Sequence[str]) -> int:
    """Print one decision by request id, or the last few.

    Args:
        args: Command line after `explain`: a request id or `--last [N]`, `--json` and `--admin URL`.

    Returns:
        Exit code: 0, or 1 if the gateway does not know the request or does not answer.
    """
    parser = argparse.ArgumentParser(
        prog="tokenway explain", description="Show why a request went where it went."
    )
    which = parser.add_mutually_exclusive_group()
    which.add_argument(
        "request_id",
        nargs="?",
        help="value of the x-tokenway-decision-id response header or the request_id of the log line",
    )
    which.add_argument(
        "--last",
        nargs="?",
        type=_count,
        const=1,
        metavar="N",
        help="the N most recent decisions, newest first; one if N is left out",
    )
    parser.add_argument("--json", action="store_true", help="the record as the gateway holds it")
    parser.add_argument("--admin", default=default_admin(), metavar="URL", help=ADMIN_HELP)
    options = parser.parse_args(args)
    if options.request_id is None:
        path = f"/explain?last={options.last or 1}"
    else:
        path = f"/explain/{quote(options.request_id, safe='')}"
    try:
        answer = fetch(options.admin.rstrip("/") + path)
    except HTTPError as exc:
        exc.close()
        is_missing = exc.code == 404 and options.request_id is not None
        problem = f"admin port {options.admin} answers with status {exc.code}; is it a gateway's?"
        print("no decision of that id is remembered" if is_missing else problem, file=sys.stderr)
        return 1
    except (OSError, ValueError, HTTPException) as exc:
        print(f"admin port {options.admin} does not answer: {exc}", file=sys.stderr)
        return 1
    if options.json:
        print(escaped_json(orjson.dumps(answer, option=orjson.OPT_INDENT_2)))
        return 0
    try:
        records = answer["records"] if options.request_id is None else [answer]
        page = "\n".join(render(record) for record in records)
    except UNREADABLE:
        print(foreign(options.admin), file=sys.stderr)
        return 1
    print(page or "no decision is remembered")
    return 0


def _count(text: str) -> int:
    """A number of decisions; the gateway itself holds a bounded number."""
    if not (text.isascii() and text.isdigit() and len(text) <= 9 and int(text) > 0):
        raise argparse.ArgumentTypeError(f"`{text}` is no number of decisions; accepted: 1 or more")
    return int(text)
