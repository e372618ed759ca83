"""Asks many addresses at once who answers there: `python -m tpvpn.lab.probe --deadline 2 ADDRESS[:PORT]…`.

The answer, on stdout, is a JSON object from each target to the body of its HTTP answer, or null for a target that did
not answer. With `--wait` it asks again until all have answered or the deadline has passed: that is how a server's start
is awaited.
"""

import argparse
import asyncio
import contextlib
import json
import time

from tpvpn.lab.servers import HTTP_PORT

PAUSE = 0.05  # seconds between two questions to a server that is not there yet


def split(target: str) -> tuple[str, int]:
    """Host and port of "10.0.0.1", "10.0.0.1:80", "fd10::1" or "[fd10::1]:80"."""
    if target.startswith("["):
        host, _, port = target[1:].partition("]:")
        return host, int(port or HTTP_PORT)
    if target.count(":") == 1:
        host, _, port = target.partition(":")
        return host, int(port)
    return target, HTTP_PORT


async def ask(target: str, path: str) -> str | None:
    """The body of one GET, or None when the target does not answer as an HTTP server does."""
    host, port = split(target)
    writer = None
    try:
        reader, writer = await asyncio.open_connection(host, port)
        writer.write(f"GET {path} HTTP/1.1\r\nHost: {host}\r\nConnection: close\r\n\r\n".encode())
        head = await reader.readuntil(b"\r\n\r\n")
        length = next((line for line in head.lower().split(b"\r\n") if line.startswith(b"content-length:")), b":0")
        body = await reader.readexactly(int(length.partition(b":")[2]))
    except (OSError, EOFError, ValueError):
        return None
    finally:
        if writer is not None:
            writer.close()
    return body.decode(errors="replace").strip() if b" 200 " in head.partition(b"\r\n")[0] else None


async def probe(targets: list[str], path: str, deadline: float, wait: bool) -> dict[str, str | None]:
    """Ask all targets, each until it answered (`wait`) or once, for at most `deadline` seconds."""
    answers: dict[str, str | None] = dict.fromkeys(targets)
    end = time.monotonic() + deadline

    async def pursue(target: str) -> None:
        while True:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(end - time.monotonic()):
                    answers[target] = await ask(target, path)
            if answers[target] is not None or not wait or time.monotonic() + PAUSE > end:
                return
            await asyncio.sleep(PAUSE)

    await asyncio.gather(*(pursue(target) for target in answers))
    return answers


def main() -> None:
    """The command described above."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--deadline", type=float, required=True)
    parser.add_argument("--wait", action="store_true")
    parser.add_argument("--path", default="/")
    parser.add_argument("target", nargs="+")
    arguments = parser.parse_args()
    answers = asyncio.run(probe(arguments.target, arguments.path, arguments.deadline, arguments.wait))
    print(json.dumps(answers))


if __name__ == "__main__":
    main()
