"""The asyncio session over a real node: same answers, same refusals, and a task that is cancelled ends its request."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from net_appliance import NOW, WORDS, Appliance, running
from net_helpers import wait_until

from countermark import aio
from countermark.errors import CountermarkError, Recorded, RequestError, Unavailable
from countermark.formats.records import Kind
from countermark.policy import Policy
from countermark.retrying import Retry


@pytest.fixture(scope="module")
def appliance(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Appliance]:
    with running(tmp_path_factory.mktemp("appliance")) as appliance:
        yield appliance


def policy(appliance: Appliance) -> Policy:
    found: Policy = appliance.machine.policy
    return found


def test_a_whole_conversation(appliance: Appliance, tmp_path: Path) -> None:
    async def talk() -> None:
        async with aio.connect(appliance.address, policy(appliance), now=NOW) as session:
            assert session.verdict.simulated
            stream = await session.generate("count for me", max_tokens=5, seed=7, temperature=0.5)
            assert stream.accepted.intent.sampling.seed == 7
            assert "".join([text async for text in stream]) == "".join(WORDS[:5])
            answer = await stream.result()
            assert (answer.text, answer.tokens) == ("".join(WORDS[:5]), stream.tokens)
            answer.save(tmp_path / "answer.cmk")
        assert session.is_over
        with pytest.raises(Unavailable) as caught:
            await session.generate("too late")
        assert caught.value.code == "session.closed"

    asyncio.run(talk())


def test_many_streams_on_one_loop_which_stays_free(appliance: Appliance) -> None:
    async def talk() -> float:
        session = await aio.connect(appliance.address, policy(appliance), now=NOW)
        late = 0.0

        async def tick() -> None:
            nonlocal late
            while True:
                before = time.monotonic()
                await asyncio.sleep(0.005)
                late = max(late, time.monotonic() - before)

        async def ask(size: int) -> int:
            answer = await (await session.generate("side by side", max_tokens=size)).result()
            return len(answer.tokens)

        ticking = asyncio.create_task(tick())
        assert await asyncio.gather(*(ask(size) for size in range(10, 34))) == list(range(10, 34))
        ticking.cancel()
        await session.close()
        return late

    appliance.engine.delay_s = 0.01
    try:
        late = asyncio.run(talk())
    finally:
        appliance.engine.delay_s = 0.0
    assert late < 0.25  # an answer takes as long: the loop waited for none


def test_a_cancelled_task_cancels_its_request(appliance: Appliance) -> None:
    async def talk() -> None:
        async with aio.connect(appliance.address, policy(appliance), now=NOW) as session:
            stream = await session.generate("for a long while", max_tokens=4000)
            reading = asyncio.create_task(stream.result())
            await asyncio.sleep(0.1)
            reading.cancel()
            with pytest.raises(asyncio.CancelledError):
                await reading
            await asyncio.to_thread(wait_until, lambda: appliance.kinds()[-1] is Kind.ABORT)
            assert (await (await session.generate("goes on", max_tokens=1)).result()).tokens

    appliance.engine.delay_s = 0.01
    try:
        asyncio.run(talk())
    finally:
        appliance.engine.delay_s = 0.0


def test_a_task_cancelled_while_the_node_commits_leaves_no_answer_running(appliance: Appliance) -> None:
    before = appliance.kinds()
    held, waiting = threading.Event(), threading.Event()

    def hold() -> None:
        waiting.set()
        held.wait(5)

    async def talk() -> None:
        async with aio.connect(appliance.address, policy(appliance), now=NOW) as session:
            asking = asyncio.create_task(session.generate("never mind", max_tokens=50))
            await asyncio.to_thread(waiting.wait, 5)
            asking.cancel()
            with pytest.raises(asyncio.CancelledError):
                await asking
            held.set()
            await asyncio.to_thread(wait_until, lambda: appliance.kinds() == [*before, Kind.INTENT, Kind.ABORT])

    appliance.engine.before_submit, appliance.engine.delay_s = hold, 0.02
    try:
        asyncio.run(talk())
    finally:
        appliance.engine.before_submit, appliance.engine.delay_s = (lambda: None), 0.0
        held.set()


def test_refusals_are_the_session_s(appliance: Appliance, tmp_path: Path) -> None:
    async def talk() -> None:
        async with aio.connect(appliance.address, policy(appliance), now=NOW) as session:
            with pytest.raises(RequestError) as caught:
                await session.generate("a", seed=-1)
            assert caught.value.code == "request.seed"
        late = policy(appliance).not_after + 1
        with pytest.raises(CountermarkError) as refused:
            await aio.connect(appliance.address, policy(appliance), now=late)
        assert refused.value.code == "policy.expired"
        with pytest.raises(Unavailable) as absent:
            await aio.connect("127.0.0.1:1", policy(appliance), retry=Retry(attempts=2, first_wait_s=0.0))
        assert absent.value.code == "channel.connect"
        assert absent.value.recorded is Recorded.NO

    asyncio.run(talk())


def test_a_busy_node_is_asked_again(appliance: Appliance) -> None:
    refusals = [2]

    def busy(*_: object) -> None:
        if refusals[0]:
            refusals[0] -= 1
            raise Unavailable("engine: busy", code="engine.busy", retry_after_s=0.01)

    async def talk() -> None:
        async with aio.connect(appliance.address, policy(appliance), now=NOW) as session:
            with pytest.raises(Unavailable) as caught:
                await session.generate("a", max_tokens=1)
            assert caught.value.recorded is Recorded.NO
            refusals[0] = 2
            retry = Retry(attempts=3, first_wait_s=0.0)
            assert (await (await session.generate("a", max_tokens=1, retry=retry)).result()).tokens

    with pytest.MonkeyPatch.context() as patch:
        reserve = appliance.engine.reserve

        def refusing(client: bytes = b"") -> object:
            busy()
            return reserve(client)

        patch.setattr(appliance.engine, "reserve", refusing)
        asyncio.run(talk())
