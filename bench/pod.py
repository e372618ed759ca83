"""A pod's ends of a bare stream: what the API server carries when there is nothing of a tunnel at either end.

`pod.py`, with the standard library alone, answers the same HTTP upgrade as a manager on two ports. On SINK it then
reads bytes and answers each MEBIBYTE of them with one byte, on SOURCE it writes bytes until the other end has gone.
"""

import contextlib
import socket
import threading
from collections.abc import Callable

SINK, SOURCE = 7001, 7002
MEBIBYTE = 1 << 20
SWITCHED = b"HTTP/1.1 101 Switching Protocols\r\nConnection: Upgrade\r\nUpgrade: tpvpn\r\n\r\n"


def sink(connection: socket.socket) -> None:
    """Read to the end."""
    buffer = bytearray(MEBIBYTE)
    have = 0
    while count := connection.recv_into(buffer):
        have += count
        if have >= MEBIBYTE:
            connection.sendall(bytes(have // MEBIBYTE))
            have %= MEBIBYTE


def source(connection: socket.socket) -> None:
    """Write for ever."""
    while True:
        connection.sendall(bytes(MEBIBYTE))


def serve(listener: socket.socket, stream: Callable[[socket.socket], None]) -> None:
    """Accept for ever; each connection has a thread."""
    while True:
        connection, _ = listener.accept()
        threading.Thread(target=switch, args=(connection, stream), daemon=True).start()


def switch(connection: socket.socket, stream: Callable[[socket.socket], None]) -> None:
    """Answer one upgrade, then stream until the other end has gone."""
    with connection, contextlib.suppress(OSError):
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        head = b""
        while not head.endswith(b"\r\n\r\n"):
            more = connection.recv(1)
            if not more:
                return
            head += more
        connection.sendall(SWITCHED)
        stream(connection)


def main() -> None:
    """The program described above."""
    threading.Thread(target=serve, args=(socket.create_server(("", SINK)), sink)).start()
    serve(socket.create_server(("", SOURCE)), source)


if __name__ == "__main__":
    main()
