"""A laptop of a test's own beside the cluster: its kubeconfigs, and what is left when tpvpn has ended there."""

import contextlib
import copy
import json
import os
import socket
import socketserver
import subprocess
import threading
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import yaml
from kubernetes_lab import ADMIN, IMAGE, Kubernetes

from peers import eventually
from pod import inside

API = ("10.131.0.11", 6443)
LOCAL = "127.0.0.1"
OURS = "jobs,pods,secrets,configmaps"


class BareLaptop:
    """A laptop in a network namespace that nobody else uses; its kubeconfig is the admin's, as a test changes it."""

    def __init__(self, cluster: Kubernetes, where: str, directory: Path) -> None:
        self.cluster, self.where, self.directory = cluster, where, directory
        self.config: dict[str, Any] = yaml.safe_load(ADMIN.read_text())
        self._before = self.network()

    def kubeconfig(self, name: str = "kubeconfig", **changes: Mapping[str, object]) -> str:
        """A kubeconfig whose `cluster` or `user` has other members: those that are None are left out."""
        config = copy.deepcopy(self.config)
        for kind, members in changes.items():
            (entry,) = config[f"{kind}s"]
            entry[kind] = {key: value for key, value in (entry[kind] | members).items() if value is not None}
        file = self.directory / name
        file.write_text(yaml.safe_dump(config))
        return str(file)

    def tpvpn(self, *words: str, kubeconfig: str | None = None, **environment: str) -> subprocess.CompletedProcess[str]:
        """Run tpvpn to its end."""
        environment["KUBECONFIG"] = kubeconfig or str(ADMIN)
        return self.cluster.tpvpn(*words, where=self.where, env=environment)

    def refused(self, *words: str, code: int, kubeconfig: str | None = None, **environment: str) -> str:
        """The one sentence with which `tpvpn connect` ended; the laptop is as it was. Warnings may stand before it."""
        ended = self.tpvpn("connect", "--image", IMAGE, *words, kubeconfig=kubeconfig, **environment)
        assert ended.returncode == code, ended.stderr
        *before, last = ended.stderr.splitlines()
        assert last.startswith("tpvpn: ") and "warning: " not in last, ended.stderr
        assert all(line.startswith(("tpvpn: warning: ", "tpvpn: the transport is ")) for line in before), ended.stderr
        assert self.network() == self._before
        inode = os.stat(f"/run/netns/{self.where}").st_ino
        assert not list(Path("/run/tpvpn").glob(f"{inode}/*"))
        return last.removeprefix("tpvpn: ")

    def nothing_is_left(self, namespace: str) -> None:
        """No object of ours is in the namespace, or soon not any more."""

        def left() -> list[str]:
            names = self.cluster.kubectl("get", OURS, "--namespace", namespace, "--output", "name").split()
            return [name for name in names if "/tpvpn" in name]

        eventually(lambda: left() == [], 20, "what is left")

    def session(self) -> dict[str, Any]:
        """The one session as `tpvpn status` shows it."""
        (shown,) = json.loads(self.tpvpn("status", "--output", "json").stdout)["sessions"]
        return shown

    def reaches(self, url: str) -> bool:
        """Whether whoever is there answers at all."""
        asked = self.cluster.run("curl", "--silent", "--insecure", "--max-time", "3", url, where=self.where)
        return asked.returncode == 0

    @contextlib.contextmanager
    def serving(self, handle: Callable[[socketserver.StreamRequestHandler], None], host: str = LOCAL) -> Iterator[int]:
        """A server on an address of the laptop, whose every connection has a thread that runs `handle`; its port."""

        class Handler(socketserver.StreamRequestHandler):
            def handle(self) -> None:
                with contextlib.suppress(OSError):
                    handle(self)

        class Server(socketserver.ThreadingTCPServer):
            address_family = socket.AF_INET6 if ":" in host else socket.AF_INET

        with inside(self.where):
            server = Server((host, 0), Handler)
        server.daemon_threads = True
        with server:
            threading.Thread(target=server.serve_forever, args=(0.05,)).start()
            try:
                yield server.server_address[1]
            finally:
                server.shutdown()

    def network(self) -> str:
        """All that a session could leave something in."""
        shows = "ip rule; ip -6 rule; ip route show table all; ip -6 route show table all; ip link; nft list ruleset"
        return self.cluster.run("sh", "-ec", shows, where=self.where).stdout


@contextlib.contextmanager
def bare_laptop(cluster: Kubernetes, directory: Path, number: int, *setup: str) -> Iterator[BareLaptop]:
    """One of the given number, which no other tests use; `setup`: what ip(8) is told there first."""
    with cluster.laptop2(number) as where:
        for words in setup:
            cluster.run("ip", *words.split(), where=where, check=True)
        addresses = ("ip", "-6", "address", "show", "tentative")  # RFC 4862 section 5.4: for a second or so
        eventually(lambda: not cluster.run(*addresses, where=where).stdout, 5, "its own IPv6 address")
        yield BareLaptop(cluster, where, directory)
