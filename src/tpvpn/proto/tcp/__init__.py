"""The TCP terminator: the end of a laptop's connection, as a value that reads segments and says what to send.

It knows nothing of addresses, ports, sockets or clocks: segments in (`wire.tcp.Segment`), segments out, `now` (seconds,
any origin, never going back) and initial sequence numbers as arguments. Names are RFC 9293's.

How it is used (manager/socket_exit is the one that does):

    connection = Connection(Limits(mss=1460))   # state LISTEN
    connection.receive_segment(syn, now)        # a SYN: `is_requested`; nothing is answered yet
    connection.accept(now, iss)                 # the real connect succeeded: SYN-ACK is to be sent
    connection.refuse()                         # … or was refused: RST is to be sent
    connection.receive_segment(segment, now)    # any number of them, then:
    connection.take_events()                    # bits: ESTABLISHED READABLE WRITABLE PEER_CLOSED RESET CLOSED KEEPALIVE
    connection.readable                         # bytes in order that the application has not taken
    connection.peek() -> list[memoryview]       # these bytes, for socket.sendmsg: views, not copies
    connection.consume(n)                       # the first n are taken: the window opens
    connection.keep()                           # copy what is still borrowed, before the segment's memory is reused
    connection.writable                         # bytes that `write` takes now (0: stop reading the real socket)
    connection.write(data)                      # immutable bytes are kept, not copied; ValueError beyond `writable`
    connection.shutdown_write()                 # FIN after all that was written
    connection.abort()                          # RST
    for segment in connection.segments_to_send(now): writer.write(buffer, at, segment, connection.send_mss)
    connection.next_timeout()                   # a time, or None
    connection.handle_timeout(now)              # when it has come; then segments_to_send(now)
    connection.resume(now)                      # the link is back after a pause: retransmit at once
    connection.is_closed                        # forget it

Call `segments_to_send` once after a batch of segments, not after each: acknowledgments are merged that way, and what
`write` brings carries them. A segment for which there is no connection gets `reset_for(segment)`.
"""

from tpvpn.proto.tcp.connection import Connection
from tpvpn.proto.tcp.reset import reset_for
from tpvpn.proto.tcp.state import CLOSED, ESTABLISHED, KEEPALIVE, PEER_CLOSED, READABLE, RESET, WRITABLE, Limits, State

__all__ = [
    "CLOSED",
    "ESTABLISHED",
    "KEEPALIVE",
    "PEER_CLOSED",
    "READABLE",
    "RESET",
    "WRITABLE",
    "Connection",
    "Limits",
    "State",
    "reset_for",
]
