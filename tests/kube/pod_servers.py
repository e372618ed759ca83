"""What answers in the pods of test_traffic, run there as `python3 -c`: the standard library alone.

TCP 7001 answers with the SHA-256 of all that came before the client's end, 7002 sends PATTERN and ends; UDP 7003 sends
back what it gets, and 7004 does so by TCP.
"""

import hashlib
import socketserver
import threading

PATTERN = bytes(range(251)) * 4096  # no power of two: what is out of place is another byte
SIZE = 50_000_000


def source() -> bytes:
    """What is transferred either way."""
    return (PATTERN * (SIZE // len(PATTERN) + 1))[:SIZE]


class Digest(socketserver.BaseRequestHandler):
    """Reads to the end, and still answers then."""

    def handle(self) -> None:
        digest = hashlib.sha256()
        while data := self.request.recv(1 << 18):
            digest.update(data)
        self.request.sendall(digest.hexdigest().encode())


class Source(socketserver.BaseRequestHandler):
    """Sends."""

    def handle(self) -> None:
        self.request.sendall(source())


class Echo(socketserver.BaseRequestHandler):
    """Sends back."""

    def handle(self) -> None:
        while data := self.request.recv(1 << 16):
            self.request.sendall(data)


class EchoDatagram(socketserver.BaseRequestHandler):
    """Sends back a datagram."""

    def handle(self) -> None:
        data, listening = self.request
        listening.sendto(data, self.client_address)


class Tcp(socketserver.ThreadingTCPServer):
    """With a thread a connection."""

    allow_reuse_address = daemon_threads = True


class Udp(socketserver.UDPServer):
    """For datagrams of any size."""

    max_packet_size = 65535


if __name__ == "__main__":
    servers = [Tcp(("", 7001), Digest), Tcp(("", 7002), Source), Tcp(("", 7004), Echo), Udp(("", 7003), EchoDatagram)]
    threads = [threading.Thread(target=server.serve_forever) for server in servers]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
