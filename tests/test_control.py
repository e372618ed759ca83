"""What whoever asks a session is told, by what comes of the question."""

import asyncio
import socket
import threading
from pathlib import Path
from typing import Any

import pytest

from tpvpn import control
from tpvpn.errors import PrivilegeError, TpvpnError, UsageError


def asked(directory: Path, answer: bytes) -> dict[str, Any]:
    """The answer of a session that says this to any question, and then goes."""
    (directory / "control").mkdir()
    with socket.socket(socket.AF_UNIX) as listening:
        listening.bind(str(directory / "control" / "socket"))
        listening.listen()

        def answering() -> None:
            with listening.accept()[0] as connected:
                connected.recv(100)
                connected.sendall(answer)

        thread = threading.Thread(target=answering)
        thread.start()
        try:
            return control.ask(directory, "speed")
        finally:
            thread.join()


@pytest.mark.parametrize("answer", [b"", b'{"up"', b"no\n"])
def test_a_session_that_ends_in_the_middle(tmp_path: Path, answer: bytes) -> None:
    with pytest.raises(TpvpnError, match="has ended, or did not answer in time") as raised:
        asked(tmp_path, answer)
    assert type(raised.value) is TpvpnError


def test_anothers_session(tmp_path: Path) -> None:
    with pytest.raises(PrivilegeError, match="another user's"):
        asked(tmp_path, b"{}\n")


def test_a_session_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="does not answer"):
        control.ask(tmp_path, "status")


def test_a_measurement_is_waited_for_and_others_are_answered_meanwhile(tmp_path: Path) -> None:
    (tmp_path / "control").mkdir()

    async def measure() -> dict[str, Any]:
        asking.set()
        await may_end.wait()
        return {"up": 1, "down": 2}

    async def explain(name: str) -> dict[str, Any]:
        return {"name": name}

    async def scenario() -> None:
        async with control.serving(
            tmp_path, control.Handles(lambda: {"state": "ready"}, may_end.set, explain, measure)
        ):
            speed = asyncio.create_task(asyncio.to_thread(control.ask, tmp_path, "speed"))
            await asking.wait()
            assert await asyncio.to_thread(control.ask, tmp_path, "status") == {"state": "ready"}
            assert await asyncio.to_thread(control.ask, tmp_path, "name web") == {"name": "web"}
            assert not speed.done()
            assert await asyncio.to_thread(control.ask, tmp_path, "quit") == {"quitting": True}
            assert await speed == {"up": 1, "down": 2}

    asking, may_end = asyncio.Event(), asyncio.Event()
    asyncio.run(scenario())
