"""Events of held conversations: resumed from another process, lost, alive, and cancelled from elsewhere."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import httpx

from tests.bot.channels.held import Events, begun, followed, said, turns_of, until
from tests.bot.conftest import ServingHere
from tests.bot.service import running_service


@asynccontextmanager
async def two_processes(
    serving_here: ServingHere, tiny_model_dir: Path, models_dir: Path, tmp_path: Path
) -> AsyncIterator[tuple[httpx.AsyncClient, httpx.AsyncClient]]:
    """Services on one data folder: one here, one in a process of its own."""
    settings = {"FRONTDESK_BASE_MODEL": str(tiny_model_dir), "FRONTDESK_DTYPE": "float32"}
    async with serving_here() as here:
        with running_service(models_dir, tmp_path / "data", **settings) as service:
            async with httpx.AsyncClient(base_url=service.url, timeout=60, trust_env=False) as there:
                yield here, there


async def test_two_processes_hold_the_same_conversations(
    serving_here: ServingHere, tiny_model_dir: Path, models_dir: Path, tmp_path: Path
) -> None:
    """One test for all of it, as a second process takes its time to start."""
    async with two_processes(serving_here, tiny_model_dir, models_dir, tmp_path) as (here, there):
        await check_a_stream_is_resumed_elsewhere_without_gap_or_overlap(here, there)
        await check_an_answer_is_cancelled_from_elsewhere(here, there)
        await check_a_message_is_answered_once_whoever_it_is_sent_to(here, there)


async def check_a_stream_is_resumed_elsewhere_without_gap_or_overlap(here: httpx.AsyncClient, there: httpx.AsyncClient) -> None:
    id_ = await begun(here)
    queued = (await said(here, id_, "I lost my card", background=True, max_tokens=200)).json()
    seen: Events = []
    async for event in followed(here, id_, queued["after"]):
        seen.append(event)
        if len(seen) == 5:
            break
    rest = await until(there, id_, "turn.completed", headers={"Last-Event-ID": seen[-1][0]})
    whole = await until(there, id_, "turn.completed", "0")
    assert seen + rest == whole
    assert len(rest) > 0
    assert len({event_id for event_id, _ in whole}) == len(whole)
    deltas = "".join(event["text"] for _, event in whole if event["type"] == "turn.delta")
    assert deltas == whole[-1][1]["turn"]["answer"]
    # The header counts before the query, as an EventSource keeps its URL.
    assert await until(there, id_, "turn.completed", "0", headers={"Last-Event-ID": seen[-1][0]}) == rest


async def check_an_answer_is_cancelled_from_elsewhere(here: httpx.AsyncClient, there: httpx.AsyncClient) -> None:
    id_ = await begun(here)
    asking = asyncio.create_task(said(here, id_, "I lost my card", max_tokens=1800))
    await until(there, id_, "turn.delta", "0")
    stopped = await asyncio.gather(*(client.post(f"/v1/conversations/{id_}/cancel") for client in (there, here)))
    turn = (await asking).json()
    assert turn["finish_reason"] == "cancelled"
    assert turn["message_id"] in [response.json()["message_id"] for response in stopped]
    assert [one["finish_reason"] for one in await turns_of(there, id_)] == ["cancelled"]


async def check_a_message_is_answered_once_whoever_it_is_sent_to(here: httpx.AsyncClient, there: httpx.AsyncClient) -> None:
    id_ = await begun(here)
    answers = await asyncio.gather(*(said(client, id_, "Hello", key="same") for client in (here, there, here, there)))
    assert [answer.status_code for answer in answers] == [200] * 4
    assert len({answer.json()["id"] for answer in answers}) == 1
    assert len(await turns_of(here, id_)) == 1


async def test_who_comes_back_too_late_is_told_that_events_are_lost(serving_here: ServingHere) -> None:
    """For an id that is no longer kept, one that never was, and what is no id at all; what is kept follows."""
    async with serving_here() as http:
        id_ = await begun(http)
        await said(http, id_, "Hello")
        kept = await until(http, id_, "turn.completed", "0")
        for unknown in ("1-1", "99999999999999-0", "nonsense", "-", "+", "$", "(", "0-0\n", "1-1-1", "\x1b[31m", "٣"):
            (lost_id, lost), *rest = await until(http, id_, "turn.completed", unknown)
            assert (lost_id, lost, rest) == ("0", {"type": "events.lost", "message_id": None}, kept)
        # Negative control: with an id that is kept nothing is lost.
        assert await until(http, id_, "turn.completed", kept[0][0]) == kept[1:]


async def test_who_names_no_place_hears_what_is_new_alone(serving_here: ServingHere) -> None:
    async with serving_here() as http:
        id_ = await begun(http)
        await said(http, id_, "before")
        path = f"/v1/conversations/{id_}/events"
        async with asyncio.timeout(60), http.stream("GET", path) as stream:
            lines = stream.aiter_lines()
            assert await anext(lines) == ": here"  # from here on
            turn = (await said(http, id_, "after")).json()
            async for line in lines:
                assert "before" not in line
                if line.startswith("event: turn.completed"):
                    assert turn["message_id"] in await anext(lines)
                    break
