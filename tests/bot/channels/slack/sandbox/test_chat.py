"""chat.*: messages that are posted, changed and deleted."""

import pytest
from slack_sdk.models.blocks import ContextActionsBlock, FeedbackButtonsElement, SectionBlock
from slack_sdk.models.metadata import Metadata
from slack_sdk.web.async_client import AsyncWebClient

from bot.channels.slack.sandbox.people import Person
from bot.channels.slack.sandbox.server import SlackSandbox
from bot.channels.slack.sandbox.world import App
from tests.bot.channels.slack.sandbox.bots import error_of, refusal


async def test_a_message_is_posted_with_all_that_belongs_to_it(slack: SlackSandbox, client: AsyncWebClient) -> None:
    channel = slack.add_channel("general")
    first = await client.chat_postMessage(channel=channel.id, text="hello")
    answer = await client.chat_postMessage(
        channel=channel.id,
        text="and more",
        thread_ts=first["ts"],
        blocks=[SectionBlock(text="and *more*")],
        metadata=Metadata(event_type="turn", event_payload={"id": "t1"}),
    )
    message = answer["message"]
    assert answer["ts"] > first["ts"]
    assert (message["text"], message["thread_ts"], message["app_id"]) == ("and more", first["ts"], slack.app.id)
    assert message["blocks"][0]["text"]["text"] == "and *more*"
    assert message["metadata"] == {"event_type": "turn", "event_payload": {"id": "t1"}}


async def test_a_persons_id_stands_for_the_direct_messages(slack: SlackSandbox, client: AsyncWebClient, alice: Person) -> None:
    answer = await client.chat_postMessage(channel=alice.id, markdown_text="**hello**")
    assert answer["channel"] == alice.direct_messages.id
    assert [message.text for message in alice.sees()] == ["**hello**"]


@pytest.mark.parametrize(
    ("arguments", "error"),
    [
        ({"text": " "}, "no_text"),
        ({"text": "hello", "markdown_text": "hello"}, "markdown_text_conflict"),
        ({"markdown_text": "a" * 12_001}, "msg_too_long"),
        ({"text": "hello", "thread_ts": "yesterday"}, "invalid_thread_ts"),
        ({"text": "hello", "metadata": {"event_type": "turn"}}, "invalid_metadata_format"),
        ({"text": "hello", "blocks": [{"type": "divider"}] * 51}, "invalid_blocks"),
        ({"text": "hello", "blocks": "no JSON"}, "invalid_blocks_format"),
    ],
)
async def test_what_slack_would_not_post_is_refused(
    slack: SlackSandbox, client: AsyncWebClient, arguments: dict[str, object], error: str
) -> None:
    channel = slack.add_channel("general")
    assert await error_of(client.api_call("chat.postMessage", json={"channel": channel.id, **arguments})) == error
    assert slack.messages == []


async def test_a_channel_must_be_there_and_the_bot_in_it(slack: SlackSandbox, client: AsyncWebClient, alice: Person) -> None:
    without, private = (
        slack.add_channel("quiet", alice, has_app=False),
        slack.add_channel("own", has_app=False, is_private=True),
    )
    archived = slack.add_channel("old")
    archived.is_archived = True
    for channel, error in [
        ("C0NOWHERE", "channel_not_found"),
        (private.id, "channel_not_found"),
        (without.id, "not_in_channel"),
        (archived.id, "is_archived"),
    ]:
        assert await error_of(client.chat_postMessage(channel=channel, text="hello")) == error


async def test_longer_text_is_cut_when_posted_and_refused_when_it_replaces(slack: SlackSandbox, client: AsyncWebClient) -> None:
    channel = slack.add_channel("general")
    ts = (await client.chat_postMessage(channel=channel.id, text="a" * 40_001))["ts"]
    assert len(slack.messages[0].text) == 40_000
    assert await error_of(client.chat_update(channel=channel.id, ts=ts, text="a" * 4_001)) == "msg_too_long"
    await client.chat_update(channel=channel.id, ts=ts, markdown_text="a" * 12_000)


async def test_a_changed_message_keeps_what_it_said(slack: SlackSandbox, client: AsyncWebClient) -> None:
    channel = slack.add_channel("general")
    block = ContextActionsBlock(
        block_id="votes",
        elements=[
            FeedbackButtonsElement(
                action_id="vote",
                positive_button={"text": {"type": "plain_text", "text": "Good"}, "value": "+"},
                negative_button={"text": {"type": "plain_text", "text": "Bad"}, "value": "-"},
            )
        ],
    )
    ts = (await client.chat_postMessage(channel=channel.id, text="one", blocks=[block]))["ts"]
    await client.chat_update(channel=channel.id, ts=ts, text="two")
    answer = await client.chat_update(channel=channel.id, ts=ts, text="three", blocks=[])
    (message,) = slack.messages
    assert [edit.text for edit in message.edits] == ["one", "two"]
    assert [bool(edit.blocks) for edit in message.edits] == [True, True]  # text alone leaves blocks as they are
    assert (message.blocks, answer["text"]) == ([], "three")
    assert answer["message"]["edited"]["user"] == slack.installation().bot_user.id


async def test_only_own_messages_can_be_changed_or_deleted(slack: SlackSandbox, client: AsyncWebClient, alice: Person) -> None:
    channel = slack.add_channel("general", alice)
    hers = alice.writes("hello", channel)
    assert await error_of(client.chat_update(channel=channel.id, ts=hers.ts, text="?")) == "cant_update_message"
    assert await error_of(client.chat_delete(channel=channel.id, ts=hers.ts)) == "cant_delete_message"
    ts = (await client.chat_postMessage(channel=channel.id, text="hello"))["ts"]
    await client.chat_delete(channel=channel.id, ts=ts)
    assert await error_of(client.chat_delete(channel=channel.id, ts=ts)) == "message_not_found"
    assert alice.sees(channel) == [hers]
    assert slack.messages[1].is_deleted


async def test_an_ephemeral_message_is_for_one_person(slack: SlackSandbox, client: AsyncWebClient, alice: Person) -> None:
    bob = slack.add_person("Bob")
    channel = slack.add_channel("general", alice, bob)
    answer = await client.chat_postEphemeral(channel=channel.id, user=alice.id, text="psst")
    assert [message.ts for message in alice.sees(channel)] == [answer["message_ts"]]
    assert bob.sees(channel) == []
    outsider = slack.add_person("Carol")
    refused = client.chat_postEphemeral(channel=channel.id, user=outsider.id, text="psst")
    assert await error_of(refused) == "user_not_in_channel"


async def test_another_name_needs_its_own_scope(slack: SlackSandbox, client: AsyncWebClient) -> None:
    channel = slack.add_channel("general")
    answer = await client.chat_postMessage(channel=channel.id, text="hello", username="Human")
    assert answer["message"]["username"] == "Human"
    slack.installation().scopes -= {"chat:write.customize"}
    refused = await refusal(client.chat_postMessage(channel=channel.id, text="hello", username="Human"))
    assert (refused.response["error"], refused.response["needed"]) == ("missing_scope", "chat:write.customize")


async def test_another_apps_messages_are_not_ones_own(slack: SlackSandbox, client: AsyncWebClient) -> None:
    other = slack.add_app(App(id="A2", client_id="2", name="Other", app_token="xapp-2"))
    slack.install(other)
    channel = slack.add_channel("general")
    theirs = AsyncWebClient(slack.bot_token(app=other), base_url=slack.api_url)
    ts = (await theirs.chat_postMessage(channel=channel.id, text="hello"))["ts"]
    assert await error_of(client.chat_update(channel=channel.id, ts=ts, text="?")) == "cant_update_message"
