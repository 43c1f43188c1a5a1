"""An agent as bolt's users write it: status, prompts and a streamed answer, until somebody presses stop."""

from typing import Any

import pytest
from slack_sdk.models.blocks import SectionBlock
from slack_sdk.web.async_client import AsyncWebClient

from bot.channels.slack.sandbox.people import Person
from bot.channels.slack.sandbox.server import SlackSandbox
from tests.bot.channels.slack.sandbox.bots import Arrivals, bolt_app, connected


@pytest.mark.parametrize("where", ["direct", "channel"])
async def test_bolts_helpers_answer_where_they_were_asked(slack: SlackSandbox, alice: Person, where: str) -> None:
    app = bolt_app(slack)

    @app.event("message")
    async def answer(event: dict[str, Any], set_status: Any, say_stream: Any) -> None:
        if event.get("subtype") is None:
            await set_status("is looking")
            stream = await say_stream(buffer_size=4)
            await stream.append(markdown_text="At nine")
            await stream.append(markdown_text=", on weekdays.")
            await stream.stop(blocks=[SectionBlock(text="Was this right?")])

    @app.event("app_mention")
    async def leave_it_to_the_message() -> None:
        pass

    async with connected(slack, app):
        channel = slack.add_channel("general", alice) if where == "channel" else alice.direct_messages
        question = alice.mentions("when do you open?", channel)
        reply = await slack.until(
            lambda: next((message for message in alice.sees(channel) if message.blocks and message.app), None)
        )
        await slack.settled()
    assert (reply.text, reply.thread_ts) == ("At nine, on weekdays.", question.ts)
    assert [status.text for status in slack.agents.statuses] == ["is looking", ""]
    assert slack.agents.sessions[channel.id, question.ts] == "active"
    start = slack.calls_of("chat.startStream")[0]
    assert (start.arguments["recipient_user_id"], start.arguments["recipient_team_id"]) == (alice.id, slack.workspace.id)


async def test_opening_the_messages_suggests_prompts(slack: SlackSandbox, alice: Person) -> None:
    app = bolt_app(slack)

    @app.event("app_home_opened")
    async def greet(event: dict[str, Any], set_suggested_prompts: Any) -> None:
        if event["tab"] == "messages":
            await set_suggested_prompts(prompts=[{"title": "Opening hours", "message": "When do you open?"}])

    async with connected(slack, app):
        alice.opens_home("messages")
        prompts = await slack.until(lambda: slack.agents.suggested(alice.direct_messages.id))
        await slack.settled()
    assert [prompt["title"] for prompt in prompts] == ["Opening hours"]


async def test_pressing_stop_reaches_the_agent(slack: SlackSandbox, client: AsyncWebClient, alice: Person) -> None:
    app, stopped = bolt_app(slack), Arrivals[dict[str, Any]]()

    @app.event("agent_session_stopped")
    async def stop(event: dict[str, Any], client: AsyncWebClient) -> None:
        thread = {"channel_id": event["channel"], "thread_ts": event["thread_ts"]}
        await client.agents_sessions_setStatus(**thread, status="active")
        stopped.append(event)

    @app.event("message")
    async def ignore() -> None:
        pass

    async with connected(slack, app):
        question = alice.writes("tell me a long story")
        stream = await client.chat_stream(channel=question.channel.id, thread_ts=question.ts, buffer_size=1)
        await stream.append(markdown_text="Once upon a time")
        alice.stops(slack.messages[-1])
        (event,) = await stopped.first(1)
        await slack.settled()
    assert event["streaming_message_ts"] == [stream.ts]
    assert slack.agents.sessions[question.channel.id, question.ts] == "active"
