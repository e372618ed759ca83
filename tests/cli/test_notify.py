"""What a service manager is told, as it hears it on its socket."""

import asyncio
import os
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest

from tpvpn.cli import notify

BEATS = 3


@pytest.fixture(params=["path", "abstract"])
def manager(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[socket.socket]:
    """Its socket, that this process is told of, and nothing of a watchdog."""
    path = str(tmp_path / "notify")
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as manager:
        manager.bind(path if request.param == "path" else f"\0{path}")
        manager.setblocking(False)
        monkeypatch.setenv("NOTIFY_SOCKET", path if request.param == "path" else f"@{path}")
        for name in ("WATCHDOG_USEC", "WATCHDOG_PID"):
            monkeypatch.delenv(name, raising=False)
        yield manager


async def hear(manager: socket.socket) -> str:
    return (await asyncio.wait_for(asyncio.get_running_loop().sock_recv(manager, 100), 5)).decode()


@pytest.mark.parametrize("pid", [None, os.getpid()], ids=["of anyone", "of this process"])
def test_a_session_that_is_watched(manager: socket.socket, monkeypatch: pytest.MonkeyPatch, pid: int | None) -> None:
    monkeypatch.setenv("WATCHDOG_USEC", "400000")
    if pid:
        monkeypatch.setenv("WATCHDOG_PID", str(pid))

    async def session() -> float:
        loop = asyncio.get_running_loop()
        async with notify.serving():
            heard, begin = [await hear(manager), await hear(manager)], loop.time()
            assert heard == ["READY=1", "WATCHDOG=1"]
            assert [await hear(manager) for _ in range(BEATS)] == ["WATCHDOG=1"] * BEATS
            took = loop.time() - begin
        assert await hear(manager) == "STOPPING=1"
        return took

    assert BEATS * 0.2 - 0.1 < asyncio.run(session()) < BEATS * 0.4


@pytest.mark.parametrize(
    "watchdog", [{}, {"WATCHDOG_USEC": "1", "WATCHDOG_PID": "1"}, {"WATCHDOG_USEC": "0"}, {"WATCHDOG_USEC": "soon"}]
)
def test_a_session_that_is_not_watched(
    manager: socket.socket, monkeypatch: pytest.MonkeyPatch, watchdog: dict[str, str]
) -> None:
    for name, value in watchdog.items():
        monkeypatch.setenv(name, value)

    async def session() -> list[str]:
        async with notify.serving():
            first = await hear(manager)
            assert len(asyncio.all_tasks()) == 1, "nothing that would tell more"
        return [first, await hear(manager)]

    assert asyncio.run(session()) == ["READY=1", "STOPPING=1"]


@pytest.mark.parametrize("place", [None, "", "/nobody/is/there"])
def test_nobody_listens(monkeypatch: pytest.MonkeyPatch, place: str | None) -> None:
    """A session goes on without."""
    if place is None:
        monkeypatch.delenv("NOTIFY_SOCKET", raising=False)
    else:
        monkeypatch.setenv("NOTIFY_SOCKET", place)

    async def session() -> bool:
        async with notify.serving():
            return True

    assert asyncio.run(session())
