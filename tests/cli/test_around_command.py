"""The command behind `--`: a signal reaches it whenever it comes."""

import asyncio
import signal

import pytest
import uvloop

from tpvpn.cli.command import Command


@pytest.mark.parametrize("turns", [0, 1, 2, 5, 20], ids=lambda turns: f"after {turns} turns of the loop")
def test_a_signal_while_it_starts(turns: int) -> None:
    async def told() -> int:
        stopped: asyncio.Future[int] = asyncio.get_running_loop().create_future()
        command = Command(["sleep", "10"], stopped)
        command.start()
        for _ in range(turns):
            await asyncio.sleep(0)
        assert command.signal(signal.SIGTERM)
        assert not command.signal(signal.SIGTERM), "the second ends the session"
        return await asyncio.wait_for(stopped, 5)

    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        assert runner.run(told()) == 128 + signal.SIGTERM


def test_the_session_ends_while_it_starts() -> None:
    async def ended() -> int:
        stopped: asyncio.Future[int] = asyncio.get_running_loop().create_future()
        command = Command(["sleep", "10"], stopped)
        command.start()
        await asyncio.wait_for(command.end(), 5)
        return stopped.result()

    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        assert runner.run(ended()) == 128 + signal.SIGTERM
