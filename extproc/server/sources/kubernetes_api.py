"""Requests to the Kubernetes API: pages of lists, watches, credentials.

Rules:
    1. Nothing raises but `ApiFailure`, whatever the server or the network does.
    2. Answers are bounded: a page, a line of a watch, a message of refusal.
    3. A token in a file is read again `TOKEN_S` after the last time; all credentials are read again after a
       401 and after a TLS connection that could not be made.
    4. A watch that is silent for `SILENT_S` is taken to be dead: servers send a bookmark every minute.
"""

from __future__ import annotations

import errno
import os
import ssl
import tempfile
from collections.abc import AsyncIterator, Callable
from contextlib import ExitStack, asynccontextmanager
from http import HTTPStatus
from pathlib import Path
from typing import Any, Final

import aiohttp
import orjson

from extproc.discovery.kubernetes.access import ACCOUNT_FOLDER, Access, Pem, of_kubeconfig, of_pod
from extproc.discovery.kubernetes.fields import text_at
from extproc.discovery.kubernetes.kinds import Collection
from extproc.discovery.kubernetes.messages import MalformedMessageError, Page, page_of
from extproc.discovery.kubernetes.reflector import TOO_LARGE, Failure, ListPage, Watch
from extproc.errors import ConfigError
from metadata_center.files import open_regular, require_regular
from metadata_center.tokens import bearer

MAX_PAGE_BYTES: Final = 16 * 1024 * 1024
"""Of a page: it is decoded at once, in some 50 ms. Objects have 1.5 MiB at most (etcd)."""

MAX_LINE_BYTES: Final = 4 * 1024 * 1024
"""Of an event."""

MAX_REFUSAL_BYTES: Final = 64 * 1024
MAX_FILE_BYTES: Final = 1024 * 1024
"""Of a token, a certificate, a kubeconfig."""

TOKEN_S: Final = 60.0
CONNECT_S: Final = 5.0
LIST_S: Final = 60.0
SILENT_S: Final = 90.0
WATCH_GRACE_S: Final = 30.0
"""How much longer than it was to last a watch is waited for."""

NAMESPACE_ENV: Final = "NAMESPACE"
"""The gateway's own namespace, for endpoint pickers by convention of llm-d."""

DEFAULT_NAMESPACE: Final = "default"


class ApiFailure(Exception):  # noqa: N818 - the word of the state machine
    """A request came to nothing."""

    def __init__(self, failure: Failure) -> None:
        super().__init__(failure.detail)
        self.failure = failure


def access_of(kubeconfig: str | None, context: str | None, base: Path) -> Access:
    """How the API is reached.

    Args:
        kubeconfig: A file, relative to `base`; None takes the service account of this pod.
        context: Of the kubeconfig.
        base: Folder of the configuration.

    Raises:
        ConfigError: The file cannot be used, or this is no pod.
    """
    if kubeconfig is None:
        try:
            namespace = _read(f"{ACCOUNT_FOLDER}/namespace").decode().strip()
        except (OSError, UnicodeDecodeError):
            namespace = ""
        return of_pod(os.environ, namespace or None)
    path = str(base / kubeconfig)
    try:
        text = _read(path).decode()
    except OSError as error:
        raise ConfigError(path, [f"cannot be read: {error.strerror or error}"]) from None
    except UnicodeDecodeError:
        raise ConfigError(path, ["cannot be read: not UTF-8"]) from None
    return of_kubeconfig(text, path, context)


def own_namespace(access: Access) -> str:
    """The gateway's own namespace: what the environment says, the credentials, or `default`."""
    return os.environ.get(NAMESPACE_ENV) or access.namespace or DEFAULT_NAMESPACE


class KubernetesApi:
    """One API server, by one user.

    Args:
        access: How it is reached.
        clock: Monotonic seconds.
    """

    def __init__(self, access: Access, clock: Callable[[], float]) -> None:
        self._access = access
        self._clock = clock
        self._session: aiohttp.ClientSession | None = None
        self._tls: ssl.SSLContext | None = None
        self._token: str | None = None
        self._token_read_s: float | None = None

    async def close(self) -> None:
        """End all requests. Idempotent."""
        session, self._session = self._session, None
        if session is not None:
            await session.close()

    async def page(self, collection: Collection, step: ListPage) -> Page:
        """A page of a list. Raises ApiFailure."""
        query = {**collection.query, "limit": str(step.limit)}
        if step.more:
            query["continue"] = step.more
        bounds = aiohttp.ClientTimeout(total=LIST_S, sock_connect=CONNECT_S)
        async with self._answer(collection.path, query, bounds) as response:
            return page_of(await _body(response, MAX_PAGE_BYTES))

    @asynccontextmanager
    async def watch(self, collection: Collection, step: Watch) -> AsyncIterator[AsyncIterator[list[bytes]]]:
        """A watch that was granted: lines as they come, some at a time. Raises ApiFailure."""
        query = {
            **collection.query,
            "watch": "1",
            "allowWatchBookmarks": "true",
            "resourceVersion": step.version,
            "timeoutSeconds": str(round(step.timeout_s)),
        }
        longest_s = step.timeout_s + WATCH_GRACE_S
        bounds = aiohttp.ClientTimeout(total=longest_s, sock_connect=CONNECT_S, sock_read=SILENT_S)
        async with self._answer(collection.path, query, bounds) as response:
            yield _lines(response)

    @asynccontextmanager
    async def _answer(
        self, path: str, query: dict[str, str], bounds: aiohttp.ClientTimeout
    ) -> AsyncIterator[aiohttp.ClientResponse]:
        """A good answer; what goes wrong with it, also while it is read, is an ApiFailure."""
        try:
            options = {"headers": self._headers(), **self._tls_options()}
        except (OSError, ValueError) as error:
            raise ApiFailure(Failure(None, f"credentials cannot be read: {_why(error)}")) from None
        try:
            async with self._session_now().get(
                self._access.server + path, params=query, timeout=bounds, allow_redirects=False, **options
            ) as response:
                if response.status != HTTPStatus.OK:
                    raise ApiFailure(await self._refusal(response))
                yield response
        except MalformedMessageError as error:
            raise ApiFailure(Failure(None, str(error))) from None
        except TimeoutError:
            raise ApiFailure(Failure(None, "no answer in time")) from None
        except (aiohttp.ClientError, OSError) as error:
            if isinstance(error, (aiohttp.ClientSSLError, ssl.SSLError)):
                self._forget_credentials()
            # The name of a class quotes neither headers nor what the server said.
            raise ApiFailure(Failure(None, type(error).__name__)) from None

    async def _refusal(self, response: aiohttp.ClientResponse) -> Failure:
        if response.status == HTTPStatus.UNAUTHORIZED:
            self._forget_credentials()
        try:
            reason = text_at(orjson.loads(await _body(response, MAX_REFUSAL_BYTES)), "reason")
        except (orjson.JSONDecodeError, ApiFailure):
            reason = ""
        asked = response.headers.get("Retry-After", "")
        seconds = float(asked) if asked.isascii() and asked.isdigit() and len(asked) < 10 else None
        return Failure(response.status, f"{response.status} {reason}".strip(), seconds)

    def _session_now(self) -> aiohttp.ClientSession:
        if self._session is None:
            headers = {"Accept": "application/json", "Accept-Encoding": "identity", "User-Agent": "tokenway"}
            # Each watch holds a connection for as long as it lasts.
            self._session = aiohttp.ClientSession(
                connector=aiohttp.TCPConnector(limit=0), headers=headers, cookie_jar=aiohttp.DummyCookieJar()
            )
        return self._session

    def _headers(self) -> dict[str, str]:
        access, token = self._access, self._access.token
        if access.token_file is not None:
            now_s = self._clock()
            if self._token_read_s is None or now_s - self._token_read_s >= TOKEN_S:
                self._token, self._token_read_s = _token(access.token_file), now_s
            token = self._token
        return {} if not token else {"Authorization": f"Bearer {token}"}

    def _tls_options(self) -> dict[str, Any]:
        if self._access.server.startswith("http:"):
            return {}
        if self._tls is None:
            self._tls = _tls_context(self._access)
        return {"ssl": self._tls, "server_hostname": self._access.server_name}

    def _forget_credentials(self) -> None:
        self._token_read_s = self._tls = None


async def _lines(response: aiohttp.ClientResponse) -> AsyncIterator[list[bytes]]:
    rest = b""
    async for chunk in response.content.iter_any():
        *lines, rest = (rest + chunk).split(b"\n")
        if lines:
            yield [line for line in lines if line]
        if len(rest) > MAX_LINE_BYTES:
            raise MalformedMessageError(f"an event of more than {MAX_LINE_BYTES} bytes")


async def _body(response: aiohttp.ClientResponse, most: int) -> bytes:
    chunks, size = [], 0
    async for chunk in response.content.iter_any():
        chunks.append(chunk)
        size += len(chunk)
        if size > most:
            raise ApiFailure(Failure(TOO_LARGE, f"an answer of more than {most} bytes"))
    return b"".join(chunks)


def _read(path: str) -> bytes:
    with open_regular(path) as file:
        content = file.read(MAX_FILE_BYTES + 1)
    if len(content) > MAX_FILE_BYTES:
        raise OSError(errno.EFBIG, f"too large; accepted: {MAX_FILE_BYTES} bytes", path)
    return content


def _token(path: str) -> str:
    """Raises OSError, which names the file."""
    try:
        return bearer(_read(path))
    except ValueError as error:
        raise OSError(errno.EINVAL, str(error), path) from None


def _why(error: OSError | ValueError) -> str:
    """With the file, where it is known; other words might quote what is in it."""
    if isinstance(error, OSError) and error.filename is not None:
        return f"{error.filename}: {error.strerror}"
    return type(error).__name__


def _tls_context(access: Access) -> ssl.SSLContext:
    """Raises OSError (ssl.SSLError is one) or ValueError for files that cannot be used."""
    context = ssl.create_default_context() if not access.ca else ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    if access.ca:
        context.load_verify_locations(
            cadata=(access.ca.data if access.ca.data is not None else _read(access.ca.file or "")).decode()
        )
    if not access.is_verified:
        context.check_hostname = False
        context.verify_mode = ssl.CERT_NONE
    if access.certificate:
        with ExitStack() as stack:
            certificate, key = _as_file(access.certificate, stack), _as_file(access.key, stack)
            context.load_cert_chain(certificate, key, password="")  # none, and no question for one
    return context


def _as_file(pem: Pem, stack: ExitStack) -> str:
    """OpenSSL reads certificates of a client from files alone: one for this user, gone after the reading."""
    if pem.file is not None:
        require_regular(pem.file)
        return pem.file
    file = tempfile.NamedTemporaryFile(prefix="tokenway-")  # noqa: SIM115 - the stack closes it
    stack.callback(file.close)
    file.write(pem.data or b"")
    file.flush()
    return file.name
