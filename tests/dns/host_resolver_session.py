"""A session's host resolver alone, as a program: python host_resolver_session.py MODE [NAME ADDRESS]

A real helper with a device, and no tunnel. Each line is JSON: {"status": …} at first and whenever the answer to
`changed` or a line on standard input asks for it, {"said": …}, {"error": …}; it ends with its standard input.
A line of input that is not empty are domains to update to.
"""

import asyncio
import json
import sys
import time

import uvloop

from tpvpn.errors import TpvpnError
from tpvpn.helper.client import start_helper
from tpvpn.host_resolver import HostResolver

OURS = "246.0.0.5"
SEARCH, DOMAINS = ("shop.svc.cluster.local",), ("cluster.local", "svc")


def tell(what: str, value: object) -> None:
    print(json.dumps({what: value}), flush=True)


async def session(mode: str, name: str = "default", address: str = OURS) -> None:
    helper = await start_helper()
    await helper.claim(name)
    _tun, addresses = await helper.open_tun(mtu=1400, addresses=(address,), offload=False, txqueuelen=500)
    resolver = HostResolver(helper, mode, addresses, lambda text: tell("said", text))  # type: ignore[arg-type]

    def status(**more: object) -> None:
        tell("status", {**resolver.status(), "claimed": resolver.claimed, **more})

    try:
        began = time.monotonic()
        await resolver.start(SEARCH, DOMAINS)
        status(took=time.monotonic() - began)
        following = asyncio.create_task(resolver.follow(status))
        stdin = asyncio.StreamReader()
        await asyncio.get_running_loop().connect_read_pipe(lambda: asyncio.StreamReaderProtocol(stdin), sys.stdin)
        while line := await stdin.readline():
            if words := line.decode().split():
                await resolver.update(SEARCH, words)
            status()
        following.cancel()
        await asyncio.gather(following, return_exceptions=True)
        if not following.cancelled():
            following.result()
    except TpvpnError as error:
        tell("error", f"{type(error).__name__}: {error}")
    finally:
        await helper.close()


if __name__ == "__main__":
    uvloop.run(session(*sys.argv[1:]))
