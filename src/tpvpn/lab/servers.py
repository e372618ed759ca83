"""What answers at the lab's addresses: HTTP on port 80 and UDP echo on port 7, one process a namespace.

`python -m tpvpn.lab.servers NAME ADDRESS…` serves until it is ended. It is a loop over epoll without layers, because
the benchmark wants the server to cost little beside the path that is measured. It reads no request: each end of a
header block (in one piece) is one GET, and the answer says who was reached, as seen here: "NAME ADDRESS".
"""

import contextlib
import select
import socket
import sys
from collections.abc import Callable
from functools import partial

HTTP_PORT = 80
ECHO_PORT = 7
END_OF_REQUEST = b"\r\n\r\n"


def answer(name: str, address: str) -> bytes:
    """The whole HTTP answer of a server at an address."""
    body = f"{name} {address}\n".encode()
    return b"HTTP/1.1 200 OK\r\nContent-Type: text/plain\r\nContent-Length: %d\r\n\r\n%b" % (len(body), body)


class Servers:
    """All servers of one namespace, on one epoll."""

    def __init__(self, name: str, addresses: list[str]) -> None:
        self._epoll = select.epoll()
        self._ready: dict[int, Callable[[], None]] = {}
        self._buffer = bytearray(65536)
        for address in addresses:
            self._listen(address, answer(name, address))
            self._echo(address)

    def serve(self) -> None:
        """Serve for ever."""
        ready = self._ready
        while True:
            for fd, _ in self._epoll.poll():
                with contextlib.suppress(OSError):
                    ready[fd]()

    def _watch(self, sock: socket.socket, ready: Callable[[], None]) -> None:
        sock.setblocking(False)
        self._ready[sock.fileno()] = ready
        self._epoll.register(sock, select.EPOLLIN)

    def _listen(self, address: str, response: bytes) -> None:
        family = socket.AF_INET6 if ":" in address else socket.AF_INET
        listener = socket.create_server((address, HTTP_PORT), family=family, backlog=4096)

        def accept() -> None:
            while True:
                connection, _ = listener.accept()
                connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                self._watch(connection, partial(self._respond, connection, response))

        self._watch(listener, accept)

    def _respond(self, connection: socket.socket, response: bytes) -> None:
        try:
            received = connection.recv(65536)
            requests = received.count(END_OF_REQUEST)
            if requests:
                connection.send(response * requests)
        except BlockingIOError:
            return
        except OSError:
            received = b""
        if not received:
            del self._ready[connection.fileno()]
            connection.close()

    def _echo(self, address: str) -> None:
        sock = socket.socket(socket.AF_INET6 if ":" in address else socket.AF_INET, socket.SOCK_DGRAM)
        sock.bind((address, ECHO_PORT))

        def echo() -> None:
            length, sender = sock.recvfrom_into(self._buffer)
            sock.sendto(memoryview(self._buffer)[:length], sender)

        self._watch(sock, echo)


if __name__ == "__main__":
    Servers(sys.argv[1], sys.argv[2:]).serve()
