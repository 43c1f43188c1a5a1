"""Messages that grow while they are read, through the SDK's own helpers and by hand."""

import pytest
from slack_sdk.models.blocks import SectionBlock
from slack_sdk.models.messages.chunk import MarkdownTextChunk, PlanUpdateChunk, TaskUpdateChunk
from slack_sdk.web.async_client import AsyncWebClient

from bot.channels.slack.sandbox.errors import ActionError
from bot.channels.slack.sandbox.messages import Message, StreamState
from bot.channels.slack.sandbox.people import Person
from bot.channels.slack.sandbox.server import SlackSandbox
from bot.channels.slack.sandbox.world import App
from tests.bot.channels.slack.sandbox.bots import error_of, refusal


@pytest.fixture
async def question(alice: Person) -> Message:
    return alice.writes("I lost my card")


async def _start(client: AsyncWebClient, question: Message, **arguments: object) -> str:
    channel_id, thread_ts = question.channel.id, question.thread
    answer = await client.api_call("chat.startStream", json={"channel": channel_id, "thread_ts": thread_ts, **arguments})
    return str(answer["ts"])


async def test_the_helper_streams_a_whole_answer(slack: SlackSandbox, client: AsyncWebClient, question: Message) -> None:
    stream = await client.chat_stream(channel=question.channel.id, thread_ts=question.ts, buffer_size=10)
    for piece in ("I have ", "blocked ", "your ", "card."):
        slack.clock.advance(1)
        await stream.append(markdown_text=piece)
    await stream.stop(markdown_text=" Anything else?", blocks=[SectionBlock(text="Was this right?")])
    answer = slack.messages[-1]
    assert answer.stream is not None
    assert answer.text == "I have blocked your card. Anything else?"
    assert (answer.ts, answer.thread_ts, answer.stream.state) == (stream.ts, question.ts, StreamState.STOPPED)
    assert answer.blocks[0]["text"]["text"] == "Was this right?"
    assert [(piece.method, piece.text) for piece in answer.stream.pieces] == [
        ("chat.startStream", "I have blocked "),
        ("chat.appendStream", "your card."),
        ("chat.stopStream", " Anything else?"),
    ]
    assert [call.method for call in slack.calls] == [piece.method for piece in answer.stream.pieces]


async def test_an_answer_shorter_than_the_buffer_starts_when_it_stops(
    slack: SlackSandbox, client: AsyncWebClient, question: Message
) -> None:
    stream = await client.chat_stream(channel=question.channel.id, thread_ts=question.ts)
    await stream.append(markdown_text="Yes.")
    await stream.stop()
    assert slack.messages[-1].text == "Yes."


async def test_all_kinds_of_chunks_are_kept(slack: SlackSandbox, client: AsyncWebClient, question: Message) -> None:
    stream = await client.chat_stream(channel=question.channel.id, thread_ts=question.ts, task_display_mode="plan")
    chunks = [PlanUpdateChunk(title="Finding out"), TaskUpdateChunk(id="1", title="Look", status="in_progress")]
    await stream.append(chunks=chunks)
    await stream.append(chunks=[MarkdownTextChunk(text="Found.")])
    await stream.stop(session_status="suspended")
    answer = slack.messages[-1]
    assert answer.stream is not None
    assert [chunk["type"] for piece in answer.stream.pieces for chunk in piece.chunks] == [
        *("plan_update", "task_update", "markdown_text"),
    ]
    assert answer.text == "Found."
    assert slack.agents.sessions[question.channel.id, question.ts] == answer.stream.session_status == "suspended"


async def test_a_stream_ends_after_five_minutes_even_while_it_is_appended_to(
    slack: SlackSandbox, client: AsyncWebClient, question: Message
) -> None:
    ts = await _start(client, question, markdown_text="a")
    for _ in range(29):
        slack.clock.advance(10)
        await client.chat_appendStream(channel=question.channel.id, ts=ts, markdown_text="a")
    slack.clock.advance(10)
    append = client.chat_appendStream(channel=question.channel.id, ts=ts, markdown_text="a")
    assert await error_of(append) == "message_not_in_streaming_state"
    assert await error_of(client.chat_stopStream(channel=question.channel.id, ts=ts)) == "message_not_in_streaming_state"
    await client.chat_update(channel=question.channel.id, ts=ts, markdown_text="the whole answer")
    assert slack.messages[-1].text == "the whole answer"
    assert slack.messages[-1].edits[0].text == "a" * 30


async def test_a_stream_that_is_open_is_neither_changed_nor_deleted(client: AsyncWebClient, question: Message) -> None:
    ts = await _start(client, question)
    update = client.chat_update(channel=question.channel.id, ts=ts, text="other")
    assert await error_of(update) == "streaming_state_conflict"
    assert await error_of(client.chat_delete(channel=question.channel.id, ts=ts)) == "cant_delete_message"


async def test_a_person_stops_it_and_the_app_hears_of_it(
    slack: SlackSandbox, client: AsyncWebClient, alice: Person, question: Message
) -> None:
    ts = await _start(client, question, markdown_text="Well, ")
    alice.stops(question)
    append = client.chat_appendStream(channel=question.channel.id, ts=ts, markdown_text="?")
    assert await error_of(append) == "stopped_by_user"
    (delivery,) = slack.deliveries_of("agent_session_stopped")
    event = delivery.payload["event"]
    assert (event["channel"], event["thread_ts"], event["user"]) == (question.channel.id, question.ts, alice.id)
    assert event["streaming_message_ts"] == [ts]
    assert slack.agents.sessions[question.channel.id, question.ts] == "processing"
    # Stopping it is the app's to tell.
    status = client.agents_sessions_setStatus(channel_id=question.channel.id, thread_ts=question.ts, status="active")
    assert (await status)["agent_status"] == "active"
    with pytest.raises(ActionError, match="no stop button"):
        alice.stops(question)


@pytest.mark.parametrize(
    ("arguments", "error"),
    [
        ({"markdown_text": "a" * 12_001}, "msg_too_long"),
        ({"chunks": [{"type": "markdown_text", "text": "a" * 6_001}] * 2}, "msg_too_long"),
        ({"chunks": [{"type": "song"}]}, "invalid_chunks"),
        ({"chunks": [{"type": "task_update", "id": "1"}]}, "invalid_chunks"),
        ({"chunks": [{"type": "blocks", "blocks": [{"type": "song"}]}]}, "invalid_blocks"),
        ({"markdown_text": "a", "chunks": [{"type": "markdown_text", "text": "a"}]}, "invalid_arguments"),
        ({"chunks": [{"type": "markdown_text", "text": "a"}]}, "streaming_mode_mismatch"),
        ({}, "invalid_arguments"),
    ],
)
async def test_what_slack_would_not_append_is_refused(
    client: AsyncWebClient, question: Message, arguments: dict[str, object], error: str
) -> None:
    ts = await _start(client, question, markdown_text="a")
    append = client.api_call("chat.appendStream", json={"channel": question.channel.id, "ts": ts, **arguments})
    assert await error_of(append) == error


async def test_a_stream_in_direct_messages_hangs_on_a_message(client: AsyncWebClient, question: Message) -> None:
    refused = await refusal(client.api_call("chat.startStream", json={"channel": question.channel.id}))
    assert refused.response["response_metadata"]["messages"] == ["[ERROR] missing required field: thread_ts"]
    ts = await _start(client, question, markdown_text="a")
    unknown = client.chat_stopStream(channel=question.channel.id, ts=ts, session_status="asleep")
    assert await error_of(unknown) == "invalid_arguments"


async def test_only_the_app_that_streams_may_append(
    slack: SlackSandbox, client: AsyncWebClient, alice: Person, question: Message
) -> None:
    channel = slack.add_channel("general", alice)
    other = slack.add_app(App(id="A2", client_id="2", name="Other", app_token="xapp-2"))
    channel.members.append(slack.install(other).bot_user.id)
    theirs = AsyncWebClient(slack.bot_token(app=other), base_url=slack.api_url)
    thread = alice.writes("hello", channel)
    recipient = {"recipient_user_id": alice.id, "recipient_team_id": slack.workspace.id}
    ts = await _start(theirs, thread, **recipient)
    append = client.chat_appendStream(channel=channel.id, ts=ts, markdown_text="?")
    assert await error_of(append) == "message_not_owned_by_app"
    plain = await client.chat_postMessage(channel=channel.id, text="no stream")
    append = client.chat_appendStream(channel=channel.id, ts=plain["ts"], markdown_text="?")
    assert await error_of(append) == "message_not_in_streaming_state"


async def test_a_stream_in_a_channel_needs_to_know_its_reader(
    slack: SlackSandbox, client: AsyncWebClient, alice: Person
) -> None:
    channel = slack.add_channel("general", alice)
    thread = alice.writes("hello", channel)
    assert await error_of(_start(client, thread)) == "missing_recipient_user_id"
    assert await error_of(_start(client, thread, recipient_user_id=alice.id)) == "missing_recipient_team_id"
    reader = {"recipient_user_id": alice.id, "recipient_team_id": "T0NOWHERE"}
    assert await error_of(_start(client, thread, **reader)) == "team_not_found"
    stream = await client.chat_stream(
        channel=channel.id, thread_ts=thread.ts, recipient_user_id=alice.id, recipient_team_id=slack.workspace.id
    )
    await stream.append(markdown_text="hello")
    await stream.stop()
    assert slack.messages[-1].text == "hello"
