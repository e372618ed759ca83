"""An API server at a laptop's 127.0.0.1, as kind has it: it knows subnets and a manager, and leads to that."""

import base64
import contextlib
import json
import socket
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

from laptop import Laptop

from pod import inside
from tpvpn.lab.topology import POD_CIDR, POD_CIDR6, PODS, PODS6, SERVICE_CIDR, SERVICE_CIDR6

PROXY = "/api/v1/namespaces/tpvpn/services/tpvpn:7070/proxy"
ACCOUNT = "ann's token"


def objects(tokens: str) -> dict[str, dict[str, object]]:
    """What is there, by path."""
    ips = [{"ip": address} for address in (*PODS, *PODS6)]
    return {
        "/apis/networking.k8s.io/v1/servicecidrs": {
            "items": [{"metadata": {"name": "kubernetes"}, "spec": {"cidrs": [SERVICE_CIDR, SERVICE_CIDR6]}}]
        },
        "/api/v1/nodes": {"items": [{"metadata": {"name": "n"}, "spec": {"podCIDRs": [POD_CIDR, POD_CIDR6]}}]},
        "/api/v1/namespaces": {"items": [{"metadata": {"name": "default"}}]},
        "/api/v1/services": {"items": []},
        "/api/v1/pods": {
            "items": [{"metadata": {"name": "p"}, "spec": {}, "status": {"podIPs": ips, "phase": "Running"}}]
        },
        "/api/v1/namespaces/tpvpn/configmaps/tpvpn": {"data": {"port": "7070"}},
        "/api/v1/namespaces/tpvpn/secrets/tpvpn": {"data": {"tokens": base64.b64encode(tokens.encode()).decode()}},
    }


@contextlib.contextmanager
def api_server(laptop: Laptop) -> Iterator[str]:
    """Its URL."""
    there, host, port = objects(laptop.lab.token_file.read_text()), *laptop.lab.manager.split(":")

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            path = self.path.partition("?")[0]
            if self.headers.get("Authorization") != f"Bearer {ACCOUNT}":
                self.answer(401, {"message": "Unauthorized"})
            elif path.startswith(PROXY):
                self.lead_to_manager(path.removeprefix(PROXY))
            elif path not in there:
                self.answer(404, {"message": f"{path} is not there"})
            else:
                self.answer(200, {} if "watch=1" in self.path else there[path])

        def answer(self, code: int, body: dict[str, object]) -> None:
            text = (
                json.dumps({"kind": "Status" if code != 200 else "Any", "metadata": {}} | body).encode()
                if code != 200 or body
                else b""
            )
            self.send_response(code)
            self.send_header("Content-Length", str(len(text)))
            self.end_headers()
            self.wfile.write(text)

        def lead_to_manager(self, path: str) -> None:
            """The upgrade goes there, and all that follows it, both ways."""
            with laptop.socket(socket.AF_INET) as manager:
                manager.connect((host, int(port)))
                head = f"GET {path} HTTP/1.1\n{self.headers}"
                manager.sendall(head.replace("\n", "\r\n").encode())
                back = threading.Thread(target=_copy, args=(manager, self.connection))
                back.start()
                _copy(self.connection, manager)
                back.join()
            self.close_connection = True

        def log_message(self, *_: object) -> None:
            """Nothing."""

    class Server(ThreadingHTTPServer):
        daemon_threads = True

        def handle_error(self, *_: object) -> None:
            """Nothing: a client leaves when it likes."""

    with inside(laptop.namespace):
        server = Server(("127.0.0.1", 0), Handler)
    serving = threading.Thread(target=server.serve_forever)
    serving.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()
        serving.join()


def _copy(source: socket.socket, target: socket.socket) -> None:
    with contextlib.suppress(OSError):
        while data := source.recv(1 << 16):
            target.sendall(data)
        target.shutdown(socket.SHUT_RDWR)
