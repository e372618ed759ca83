"""A closed loop of HTTP clients, run on the laptop: `load.py connections|requests ADDRESS --seconds S --clients N`.

Each of N clients has one request under way: `connections` opens a connection for each request and closes it after the
answer, `requests` keeps its connection. The result, on stdout, is a JSON object: rate a second, and p50 and p99 of a
request in ms. One thread on epoll, because the load shall cost little beside the path that is measured.
"""

import argparse
import json
import select
import socket
import time

REQUEST = b"GET / HTTP/1.1\r\nHost: bench\r\n\r\n"
PORT = 80


class Load:
    """N clients on one epoll; `latencies` in seconds, one for each request done."""

    def __init__(self, address: str, keep: bool) -> None:
        self._address = address
        self._keep = keep
        self._epoll = select.epoll()
        self._clients: dict[int, socket.socket] = {}
        self._started: dict[int, float] = {}
        self.latencies: list[float] = []

    def run(self, clients: int, seconds: float) -> float:
        """Keep `clients` busy for `seconds`; the time it really took."""
        for _ in range(clients):
            self._open()
        began = time.perf_counter()
        while (now := time.perf_counter()) < began + seconds:
            for fd, events in self._epoll.poll(1.0):
                if events & select.EPOLLIN:
                    self._answered(fd)
                elif events & select.EPOLLOUT:
                    self._connected(fd)
                else:
                    raise ConnectionError(f"{self._address} refuses connections")
        return now - began

    def _open(self) -> None:
        client = socket.socket(type=socket.SOCK_STREAM)
        client.setblocking(False)
        client.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        fd = client.fileno()
        self._clients[fd] = client
        self._started[fd] = time.perf_counter()
        client.connect_ex((self._address, PORT))
        self._epoll.register(fd, select.EPOLLOUT)

    def _connected(self, fd: int) -> None:
        self._epoll.modify(fd, select.EPOLLIN)
        self._clients[fd].send(REQUEST)

    def _answered(self, fd: int) -> None:
        client = self._clients[fd]
        if not client.recv(65536):
            raise ConnectionError(f"{self._address} closed a connection")
        now = time.perf_counter()
        self.latencies.append(now - self._started[fd])
        if self._keep:
            self._started[fd] = now
            client.send(REQUEST)
        else:
            del self._clients[fd]
            client.close()
            self._open()


def main() -> None:
    """The command described above."""
    parser = argparse.ArgumentParser()
    parser.add_argument("kind", choices=["connections", "requests"])
    parser.add_argument("address")
    parser.add_argument("--seconds", type=float, required=True)
    parser.add_argument("--clients", type=int, required=True)
    arguments = parser.parse_args()
    load = Load(arguments.address, arguments.kind == "requests")
    seconds = load.run(arguments.clients, arguments.seconds)
    ordered = sorted(load.latencies)
    if not ordered:
        raise SystemExit(f"{arguments.address} answered nothing in {arguments.seconds} s")
    quantiles = {f"p{percent}_ms": ordered[len(ordered) * percent // 100] * 1e3 for percent in (50, 99)}
    print(json.dumps({"rate": len(ordered) / seconds, **quantiles}))


if __name__ == "__main__":
    main()
