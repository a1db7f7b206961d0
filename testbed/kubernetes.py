"""A real Kubernetes API without nodes: etcd, kube-apiserver, and the controller that makes EndpointSlices.

    async with running_cluster(folder) as cluster:
        await cluster.apply(pod("a", labels={"app": "vllm"}))
        await cluster.make_ready("a", ip="10.1.0.1")

There is no scheduler and no kubelet: a test says where a Pod runs, that it is ready, and that it is gone.

Rules:
    1. Everything is in one folder and on loopback; ports stay the same over restarts.
    2. A user is a token: `admin` may do all, the others what a Role of the test allows.
    3. What a test applies is applied on the server's side, as `kubectl apply --server-side` does.
"""

from __future__ import annotations

import asyncio
import json
import secrets
import subprocess
from collections.abc import AsyncIterator, Iterable, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import aiohttp
import yaml

from testbed.certificates import trusting
from testbed.control_planes.build import binary, is_built
from testbed.processes import START_TIMEOUT_S, Subprocess, answers, eventually, free_port

STARTS: Final = 3
"""A port is lost to another process once in many runs; twice in a row there is another cause."""

ADMIN: Final = "admin"
NODE: Final = "node-1"
"""The node that Pods of `pod` are bound to; the controller leaves out Pods of nodes that do not exist."""

FIELD_MANAGER: Final = "testbed"
READY_POLL_S: Final = 0.1


def is_available() -> bool:
    """True if all of it is built."""
    return is_built("kubernetes") and is_built("etcd")


class RefusedError(Exception):
    """The API server answered with another status than 2xx.

    Attributes:
        status: Of HTTP.
        body: Its Status object, or what else it said.
    """

    def __init__(self, status: int, body: Any) -> None:
        super().__init__(f"{status}: {body}")
        self.status = status
        self.body = body


def pod(
    name: str,
    *,
    labels: Mapping[str, str],
    namespace: str = "default",
    ports: Mapping[str, int] | None = None,
    annotations: Mapping[str, str] | None = None,
) -> dict[str, Any]:
    """A Pod on `NODE`, with one container and named ports."""
    container = {
        "name": "engine",
        "image": "none.invalid/engine",
        "ports": [{"name": name, "containerPort": port} for name, port in (ports or {}).items()],
    }
    return {
        "apiVersion": "v1",
        "kind": "Pod",
        "metadata": {
            "name": name,
            "namespace": namespace,
            "labels": dict(labels),
            "annotations": dict(annotations or {}),
        },
        "spec": {"nodeName": NODE, "containers": [container]},
    }


def inference_pool(
    name: str,
    *,
    labels: Mapping[str, str],
    ports: Iterable[int] = (8000,),
    picker: str = "tokenway",
    namespace: str = "default",
) -> dict[str, Any]:
    """An InferencePool over Pods with these labels, whose picker is a Service's port 9002."""
    return {
        "apiVersion": "inference.networking.k8s.io/v1",
        "kind": "InferencePool",
        "metadata": {"name": name, "namespace": namespace},
        "spec": {
            "selector": {"matchLabels": dict(labels)},
            "targetPorts": [{"number": port} for port in ports],
            "endpointPickerRef": {"name": picker, "port": {"number": 9002}},
        },
    }


@dataclass(slots=True)
class Cluster:
    """One control plane; `running_cluster` starts and ends it.

    Attributes:
        folder: For data, certificates, kubeconfigs and logs.
        users: Further users that may authenticate, by name; they may do what Roles allow.
        port: The API server's, HTTPS.
        etcd_port: etcd's, for clients.
        tokens: Of each user.
    """

    folder: Path
    users: tuple[str, ...] = ()
    port: int = field(default_factory=free_port)
    etcd_port: int = field(default_factory=free_port)
    tokens: dict[str, str] = field(default_factory=dict)
    _peer_port: int = field(default_factory=free_port)
    _etcd: Subprocess | None = None
    _apiserver: Subprocess | None = None
    _controllers: Subprocess | None = None
    _session: aiohttp.ClientSession | None = None
    _paths: dict[tuple[str, str], tuple[str, bool]] = field(default_factory=dict)

    @property
    def url(self) -> str:
        """Of the API server."""
        return f"https://127.0.0.1:{self.port}"

    @property
    def authority(self) -> Path:
        """The certificate that clients trust."""
        return self.folder / "certificates" / "apiserver.crt"

    def kubeconfig(self, user: str = ADMIN) -> Path:
        """The kubeconfig of a user."""
        return self.folder / f"{user}.kubeconfig"

    def _write_kubeconfig(self, user: str) -> None:
        config = {
            "apiVersion": "v1",
            "kind": "Config",
            "clusters": [
                {
                    "name": "test",
                    "cluster": {"server": self.url, "certificate-authority": str(self.authority)},
                }
            ],
            "users": [{"name": user, "user": {"token": self.tokens[user]}}],
            "contexts": [
                {"name": "test", "context": {"cluster": "test", "user": user, "namespace": "default"}}
            ],
            "current-context": "test",
        }
        self.kubeconfig(user).write_text(yaml.safe_dump(config, sort_keys=False))

    async def start(self) -> None:
        """Start everything, and wait until objects can be made.

        Raises:
            AssertionError: Something ended, or took too long; shows the end of its log.
        """
        self._prepare()
        await self._start_etcd()
        await self.start_apiserver()
        await self.apply(
            {
                "apiVersion": "v1",
                "kind": "Node",
                "metadata": {"name": NODE, "labels": {"topology.kubernetes.io/zone": "zone-1"}},
            }
        )
        await self._start_controllers()

    def _prepare(self) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        (self.folder / "certificates").mkdir(exist_ok=True)
        for user in (ADMIN, *self.users):
            self.tokens.setdefault(user, secrets.token_hex(16))
        lines = [
            f'{token},{user},{user},"{"system:masters" if user == ADMIN else "testbed"}"\n'
            for user, token in self.tokens.items()
        ]
        (self.folder / "tokens.csv").write_text("".join(lines))
        for words in (
            ("genrsa", "-out", "accounts.key", "2048"),
            ("rsa", "-in", "accounts.key", "-pubout", "-out", "accounts.pub"),
        ):
            command = ["openssl", *words]
            subprocess.run(command, cwd=self.folder, check=True, capture_output=True, timeout=60)

    async def _start_etcd(self) -> None:
        clients, peers = f"http://127.0.0.1:{self.etcd_port}", f"http://127.0.0.1:{self._peer_port}"
        self._etcd = await Subprocess.start(
            [
                *(str(binary("etcd", "etcd")), "--data-dir", str(self.folder / "etcd")),
                *("--listen-client-urls", clients, "--advertise-client-urls", clients),
                *("--listen-peer-urls", peers, "--initial-advertise-peer-urls", peers),
                *("--initial-cluster", f"default={peers}", "--unsafe-no-fsync", "--log-level", "warn"),
            ],
            self.folder / "etcd.log",
        )
        await answers(self._etcd, f"{clients}/health", lambda body: b'"true"' in body)

    async def start_apiserver(self) -> None:
        """Start the API server, or start it again, and wait until it is ready."""
        certificates = self.folder / "certificates"
        self._apiserver = await Subprocess.start(
            [
                str(binary("kubernetes", "kube-apiserver")),
                *("--etcd-servers", f"http://127.0.0.1:{self.etcd_port}"),
                *("--bind-address", "127.0.0.1", "--advertise-address", "127.0.0.1"),
                *("--secure-port", str(self.port), "--cert-dir", str(certificates)),
                *("--endpoint-reconciler-type", "none", "--service-cluster-ip-range", "10.0.0.0/24"),
                *("--authorization-mode", "RBAC", "--token-auth-file", str(self.folder / "tokens.csv")),
                *("--disable-admission-plugins", "ServiceAccount", "--allow-privileged"),
                *("--service-account-issuer", "https://127.0.0.1/"),
                *("--service-account-key-file", str(self.folder / "accounts.pub")),
                *("--service-account-signing-key-file", str(self.folder / "accounts.key")),
                # Compaction is a test's own doing.
                *("--etcd-compaction-interval", "0"),
            ],
            self.folder / "apiserver.log",
        )
        await self._until_ready(self._apiserver)
        for user in self.tokens:
            self._write_kubeconfig(user)

    async def _until_ready(self, process: Subprocess) -> None:
        async with asyncio.timeout(START_TIMEOUT_S):
            while True:
                assert process.is_running, process.log.read_text(errors="replace")[-4000:]
                try:
                    await self.request("GET", "/readyz", as_text=True)
                except (aiohttp.ClientError, RefusedError, OSError):
                    await asyncio.sleep(READY_POLL_S)
                else:
                    return

    async def stop_apiserver(self) -> None:
        """Kill the API server: connections break, and new ones are refused."""
        assert self._apiserver is not None
        await self._apiserver.kill()
        await self._close_session()

    async def _start_controllers(self) -> None:
        self._controllers = await Subprocess.start(
            [
                str(binary("kubernetes", "kube-controller-manager")),
                *("--kubeconfig", str(self.kubeconfig()), "--leader-elect=false", "--secure-port", "0"),
                *("--controllers", "endpointslice-controller"),
            ],
            self.folder / "controllers.log",
        )

    async def stop(self) -> None:
        """Kill everything."""
        await self._close_session()
        for process in (self._controllers, self._apiserver, self._etcd):
            if process is not None:
                await process.kill()

    async def _close_session(self) -> None:
        if self._session is not None:
            await self._session.close()
            self._session = None

    def session(self) -> aiohttp.ClientSession:
        """A session that trusts the API server; closed when that stops."""
        if self._session is None:
            context = trusting(Path(self.authority))
            connector = aiohttp.TCPConnector(ssl=context)
            timeout = aiohttp.ClientTimeout(total=60)
            self._session = aiohttp.ClientSession(connector=connector, timeout=timeout)
        return self._session

    async def request(
        self,
        method: str,
        path: str,
        body: Any = None,
        *,
        content_type: str = "application/json",
        user: str = ADMIN,
        as_text: bool = False,
    ) -> Any:
        """One request; the decoded answer.

        Raises:
            RefusedError: The status is not 2xx.
        """
        headers = {"authorization": f"Bearer {self.tokens[user]}", "content-type": content_type}
        data = None if body is None else json.dumps(body)
        async with self.session().request(method, self.url + path, data=data, headers=headers) as reply:
            text = await reply.text()
            if reply.status >= 300:
                raise RefusedError(reply.status, text if as_text else _decoded(text))
            return text if as_text else _decoded(text)

    async def path_of(self, document: Mapping[str, Any]) -> str:
        """Where an object is, by its apiVersion, kind, namespace and name.

        Raises:
            KeyError: The API server does not serve such a kind (yet).
        """
        version, kind = document["apiVersion"], document["kind"]
        root = f"/apis/{version}" if "/" in version else f"/api/{version}"
        if (version, kind) not in self._paths:
            found = await self.request("GET", root)
            for resource in found["resources"]:
                if "/" not in resource["name"]:
                    self._paths[version, resource["kind"]] = resource["name"], resource["namespaced"]
        plural, namespaced = self._paths[version, kind]
        metadata = document["metadata"]
        scope = f"/namespaces/{metadata.get('namespace', 'default')}" if namespaced else ""
        return f"{root}{scope}/{plural}/{metadata['name']}"

    async def apply(self, *documents: Mapping[str, Any]) -> None:
        """Apply objects in order; definitions of kinds are waited for."""
        for document in documents:
            path = await self.path_of(document)
            query = f"?fieldManager={FIELD_MANAGER}&force=true"
            await self.request("PATCH", path + query, document, content_type="application/apply-patch+yaml")
        for document in documents:
            if document["kind"] == "CustomResourceDefinition":
                await self._established(document)

    async def _established(self, definition: Mapping[str, Any]) -> None:
        path = await self.path_of(definition)

        async def read() -> dict[str, str]:
            found = await self.request("GET", path)
            conditions = found.get("status", {}).get("conditions", [])
            return {condition["type"]: condition["status"] for condition in conditions}

        await eventually(read, lambda conditions: conditions.get("Established") == "True")
        # Established is said a moment before the kind is in the server's list of what it serves.
        spec = definition["spec"]
        served = [version["name"] for version in spec["versions"] if version["served"]]

        async def is_listed() -> bool:
            try:
                for version in served:
                    found = await self.request("GET", f"/apis/{spec['group']}/{version}")
                    if spec["names"]["plural"] not in {resource["name"] for resource in found["resources"]}:
                        return False
            except RefusedError:
                return False
            return True

        await eventually(is_listed, bool)

    async def get(self, document: Mapping[str, Any]) -> Any:
        """An object as it is now."""
        return await self.request("GET", await self.path_of(document))

    async def delete(self, document: Mapping[str, Any], *, grace_s: int | None = None) -> None:
        """Delete an object. A Pod then terminates until it is deleted with `grace_s=0`, as by a kubelet."""
        options = {} if grace_s is None else {"gracePeriodSeconds": grace_s}
        await self.request("DELETE", await self.path_of(document), options)

    async def merge(self, document: Mapping[str, Any], changes: Mapping[str, Any], part: str = "") -> None:
        """Merge changes into an object, or into a part of it: `/status`."""
        path = await self.path_of(document) + part
        await self.request("PATCH", path, changes, content_type="application/merge-patch+json")

    async def make_ready(
        self,
        name: str,
        *,
        ip: str,
        further_ips: Iterable[str] = (),
        ready: bool = True,
        namespace: str = "default",
    ) -> None:
        """What a kubelet does: the Pod runs, has an address, and is ready or not."""
        state = "True" if ready else "False"
        status = {
            "phase": "Running",
            "podIP": ip,
            "podIPs": [{"ip": address} for address in (ip, *further_ips)],
            "conditions": [{"type": "Ready", "status": state}, {"type": "ContainersReady", "status": state}],
        }
        await self.merge(_pod(name, namespace), {"status": status}, "/status")

    async def delete_pod(
        self, name: str, *, namespace: str = "default", gone: bool = False, grace_s: int = 30
    ) -> None:
        """Have a Pod terminate, or be `gone` at once."""
        await self.delete(_pod(name, namespace), grace_s=0 if gone else grace_s)

    async def account_token(
        self,
        account: str,
        namespace: str = "default",
        *,
        seconds: int = 3600,
        audiences: Iterable[str] = (),
    ) -> str:
        """A token of a ServiceAccount, as a Pod is given one; void when the account is deleted."""
        path = f"/api/v1/namespaces/{namespace}/serviceaccounts/{account}/token"
        asked = {
            "apiVersion": "authentication.k8s.io/v1",
            "kind": "TokenRequest",
            "spec": {"expirationSeconds": seconds, "audiences": list(audiences)},
        }
        token: str = (await self.request("POST", path, asked))["status"]["token"]
        return token

    async def forget(self) -> None:
        """Forget all versions before the present one: etcd compacts, the API server starts again.

        A list that continues from before is answered 410 then, a watch from before by an event of code 410.
        The API server's own cache would still serve such a list, therefore it starts again.
        """
        url = f"http://127.0.0.1:{self.etcd_port}/v3/kv"
        async with aiohttp.ClientSession() as session:
            # The key does not exist; the answer's header has the revision.
            async with session.post(f"{url}/range", json={"key": "AA=="}) as reply:
                revision = (await reply.json())["header"]["revision"]
            asked = {"revision": revision, "physical": True}
            async with session.post(f"{url}/compaction", json=asked) as reply:
                assert reply.status == 200, await reply.text()
        await self.stop_apiserver()
        await self.start_apiserver()


def _pod(name: str, namespace: str) -> dict[str, Any]:
    return {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": name, "namespace": namespace}}


def _decoded(text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError:
        return text


@asynccontextmanager
async def running_cluster(folder: Path, *, users: tuple[str, ...] = ()) -> AsyncIterator[Cluster]:
    """A control plane in a folder; killed at the end. Started again with other ports if it lost one."""
    for attempt in range(STARTS):
        cluster = Cluster(folder / str(attempt), users)
        try:
            await cluster.start()
            break
        except AssertionError as error:
            await cluster.stop()
            if "address already in use" not in str(error) or attempt == STARTS - 1:
                raise
        except BaseException:
            await cluster.stop()
            raise
    try:
        yield cluster
    finally:
        await cluster.stop()
