"""An API server that is none: HTTPS in a lab's namespace, and what it answers is a test's to say."""

import base64
import contextlib
import json
import ssl
import threading
import time
from collections.abc import Iterator
from email.utils import formatdate
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

from peers import Certificate, self_signed
from pod import inside

API_VERSIONS = {"kind": "APIVersions", "versions": ["v1"]}
REVIEWS = "/apis/authorization.k8s.io/v1/selfsubjectaccessreviews"


class ApiServer:
    """What it says: to all the same `status`, else its objects by path; rights that it does not `deny`."""

    def __init__(self, address: str, certificate: Certificate) -> None:
        self.address, self.certificate, self.port = address, certificate, 0
        self.reset()

    def reset(self) -> None:
        """Be well again."""
        self.status = 0
        self.ahead = 0.0
        self.deny: set[tuple[str, str]] = set()
        self.objects: dict[str, Any] = {"/api": API_VERSIONS}
        self.listing("/apis/networking.k8s.io/v1/servicecidrs", {"spec": {"cidrs": ["10.130.0.0/16"]}})
        self.listing("/api/v1/nodes", {"spec": {"podCIDRs": ["10.132.0.0/16"]}})
        for kind in ("services", "pods", "namespaces"):
            self.listing(f"/api/v1/{kind}")

    def listing(self, path: str, *items: dict[str, Any]) -> None:
        """Have objects in a list."""
        named = [{"metadata": {"name": f"x{number}"}, **item} for number, item in enumerate(items)]
        self.objects[path] = {"kind": "List", "metadata": {}, "items": named}

    def answer(self, path: str, body: bytes) -> tuple[int, Any]:
        if self.status:
            return self.status, _status(self.status, "says no")
        if path == REVIEWS:
            asked = json.loads(body)["spec"]["resourceAttributes"]
            resource = "/".join(filter(None, (asked["resource"], asked["subresource"])))
            return 201, {"kind": "Review", "status": {"allowed": (asked["verb"], resource) not in self.deny}}
        found = self.objects.get(path.partition("?")[0])
        return (200, found) if found else (404, _status(404, "not found"))

    def kubeconfig(self, file: Path, **changes: dict[str, Any]) -> Path:
        """A kubeconfig that leads here; `cluster` has other members, of which none is None, and `user` those."""
        authority = base64.b64encode(self.certificate.certificate.read_bytes()).decode()
        cluster: dict[str, Any] = {
            "server": f"https://{self.address}:{self.port}",
            "certificate-authority-data": authority,
        }
        cluster |= changes.get("cluster", {})
        user = changes.get("user", {"token": "very-secret-token"})
        config = {
            "current-context": "test",
            "contexts": [{"name": "test", "context": {"cluster": "test", "user": "ann"}}],
            "clusters": [{"name": "test", "cluster": {key: value for key, value in cluster.items() if value}}],
            "users": [{"name": "ann", "user": user}],
        }
        file.write_text(json.dumps(config))
        return file


def _status(code: int, message: str) -> dict[str, Any]:
    return {"kind": "Status", "code": code, "message": message}


@contextlib.contextmanager
def api_server(namespace: str, address: str, directory: Path) -> Iterator[ApiServer]:
    """One that listens in a network namespace."""
    server = ApiServer(address, self_signed(directory, "api", f"IP:{address},IP:127.0.0.1"))

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def handle(self) -> None:
            with contextlib.suppress(OSError):
                super().handle()

        def do_GET(self) -> None:
            body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
            status, said = server.answer(self.path, body)
            data = json.dumps(said).encode()
            self.send_response(status)
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        do_POST = do_GET

        def date_time_string(self, timestamp: float | None = None) -> str:
            return formatdate(time.time() + server.ahead, usegmt=True)

        def log_message(self, *_: object) -> None:
            pass

    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(server.certificate.certificate, server.certificate.key)
    with inside(namespace):
        listening = ThreadingHTTPServer((address, 0), Handler)
    listening.daemon_threads = True
    listening.socket = context.wrap_socket(listening.socket, server_side=True, do_handshake_on_connect=False)
    server.port = listening.server_address[1]
    serving = threading.Thread(target=listening.serve_forever, args=(0.05,))
    serving.start()
    try:
        yield server
    finally:
        listening.shutdown()
        serving.join()
        listening.server_close()
