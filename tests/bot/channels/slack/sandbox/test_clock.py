"""Time that stands still until it is moved on."""

import asyncio
import time

import pytest

from bot.channels.slack.sandbox.clock import Changes, Clock


async def test_who_sleeps_wakes_when_the_clock_is_moved_on() -> None:
    clock = Clock(speed=0)
    began = clock.now()
    sleeping = asyncio.create_task(clock.sleep(300))
    await asyncio.sleep(0)
    clock.advance(299)
    await asyncio.sleep(0.01)
    assert not sleeping.done()
    clock.advance(1)
    await asyncio.wait_for(sleeping, 10)
    assert clock.now() == pytest.approx(began + 300)


def test_it_is_the_real_time_unless_it_is_said_otherwise() -> None:
    assert Clock().now() == pytest.approx(time.time(), abs=60)


async def test_a_fast_clock_needs_a_fraction_of_the_time() -> None:
    await asyncio.wait_for(Clock(speed=10_000).sleep(300), 10)


async def test_a_limit_is_one_on_this_clock() -> None:
    clock = Clock(speed=0)
    never = asyncio.get_running_loop().create_future()
    limited = asyncio.create_task(clock.within(3, never))
    await asyncio.sleep(0)
    clock.advance(3)
    with pytest.raises(TimeoutError):
        await asyncio.wait_for(limited, 10)
    assert never.cancelled()


async def test_what_is_done_in_time_gives_its_value() -> None:
    assert await Clock(speed=0).within(3, asyncio.sleep(0, "done")) == "done"


async def test_who_waits_for_a_condition_is_told_of_changes() -> None:
    changes, values = Changes(), list[int]()
    waiting = asyncio.create_task(changes.until(lambda: values[-1:]))
    await asyncio.sleep(0)
    values.append(7)
    changes.notify()
    assert await asyncio.wait_for(waiting, 10) == [7]


async def test_what_never_comes_about_is_an_error() -> None:
    with pytest.raises(TimeoutError):
        await Changes().until(lambda: False, timeout_s=0.01)
