"""What an agent shows beside its messages: status, prompts, title, session."""

import pytest
from slack_sdk.web.async_client import AsyncWebClient

from bot.channels.slack.sandbox.messages import Message
from bot.channels.slack.sandbox.people import Person
from bot.channels.slack.sandbox.server import SlackSandbox
from tests.bot.channels.slack.sandbox.bots import error_of


@pytest.fixture
async def question(alice: Person) -> Message:
    return alice.writes("I lost my card")


async def test_a_status_goes_after_two_minutes(slack: SlackSandbox, client: AsyncWebClient, question: Message) -> None:
    channel_id, thread_ts = question.channel.id, question.ts
    await client.assistant_threads_setStatus(
        channel_id=channel_id, thread_ts=thread_ts, status="is looking", loading_messages=["Looking", "Still looking"]
    )
    slack.clock.advance(119)
    assert slack.agents.status(channel_id, thread_ts) == "is looking"
    slack.clock.advance(1)
    assert slack.agents.status(channel_id, thread_ts) == ""
    assert slack.agents.statuses[0].loading_messages == ["Looking", "Still looking"]


async def test_a_status_goes_with_the_answer_or_an_empty_one(
    slack: SlackSandbox, client: AsyncWebClient, question: Message
) -> None:
    channel_id, thread_ts = question.channel.id, question.ts
    await client.assistant_threads_setStatus(channel_id=channel_id, thread_ts=thread_ts, status="is looking")
    await client.chat_postMessage(channel=channel_id, thread_ts=thread_ts, text="Found.")
    assert slack.agents.status(channel_id, thread_ts) == ""
    await client.assistant_threads_setStatus(channel_id=channel_id, thread_ts=thread_ts, status="is looking again")
    await client.assistant_threads_setStatus(channel_id=channel_id, thread_ts=thread_ts, status="")
    assert slack.agents.status(channel_id, thread_ts) == ""


async def test_four_prompts_are_suggested_with_a_thread_or_without(
    slack: SlackSandbox, client: AsyncWebClient, question: Message
) -> None:
    prompts = [{"title": f"Prompt {number}", "message": "I lost my card"} for number in range(5)]
    channel_id = question.channel.id
    too_many = client.assistant_threads_setSuggestedPrompts(channel_id=channel_id, prompts=prompts)
    assert await error_of(too_many) == "invalid_arguments"
    untitled = client.assistant_threads_setSuggestedPrompts(channel_id=channel_id, prompts=[{"title": "a"}])
    assert await error_of(untitled) == "invalid_arguments"
    await client.assistant_threads_setSuggestedPrompts(channel_id=channel_id, prompts=prompts[:4])
    await client.assistant_threads_setSuggestedPrompts(channel_id=channel_id, thread_ts=question.ts, prompts=prompts[:1])
    assert len(slack.agents.suggested(channel_id)) == 4
    assert len(slack.agents.suggested(channel_id, question.ts)) == 1


async def test_a_thread_has_a_title_and_a_session(slack: SlackSandbox, client: AsyncWebClient, question: Message) -> None:
    thread = {"channel_id": question.channel.id, "thread_ts": question.ts}
    await client.assistant_threads_setTitle(**thread, title="Lost card")
    await client.agents_sessions_setStatus(**thread, status="processing", title="ignored, as there is one")
    assert slack.agents.titles == {(question.channel.id, question.ts): "Lost card"}
    assert slack.agents.sessions == {(question.channel.id, question.ts): "processing"}
    assert await error_of(client.agents_sessions_setStatus(**thread, status="asleep")) == "invalid_arguments"


async def test_who_does_not_hear_of_stops_is_warned(slack: SlackSandbox, client: AsyncWebClient, question: Message) -> None:
    slack.app.bot_events -= {"agent_session_stopped"}
    answer = await client.agents_sessions_setStatus(channel_id=question.channel.id, thread_ts=question.ts, status="processing")
    assert answer["warning"] == "missing_agent_session_stopped_event_subscription"


async def test_a_thread_that_is_none_has_no_status(client: AsyncWebClient, question: Message) -> None:
    call = client.assistant_threads_setStatus(
        channel_id=question.channel.id, thread_ts="1700000000.000000", status="is looking"
    )
    assert await error_of(call) == "thread_not_found"
