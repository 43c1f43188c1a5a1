"""Reading channels, threads and people, page by page."""

from slack_sdk.web.async_client import AsyncWebClient

from bot.channels.slack.sandbox.people import Person
from bot.channels.slack.sandbox.server import SlackSandbox
from bot.channels.slack.sandbox.world import App
from tests.bot.channels.slack.sandbox.bots import error_of, refusal


async def test_a_history_is_read_in_pages_newest_first(slack: SlackSandbox, client: AsyncWebClient, alice: Person) -> None:
    channel = slack.add_channel("general", alice)
    messages = [alice.writes(str(number), channel) for number in range(7)]
    alice.writes("in a thread", thread=messages[0])
    pages = [page["messages"] async for page in await client.conversations_history(channel=channel.id, limit=3)]
    assert [len(page) for page in pages] == [3, 3, 1]
    assert [message["text"] for page in pages for message in page] == list("6543210")
    assert pages[2][0]["reply_count"] == 1
    between = {"oldest": messages[2].ts, "latest": messages[4].ts}
    answer = await client.conversations_history(channel=channel.id, **between)
    assert [message["text"] for message in answer["messages"]] == ["3"]
    answer = await client.conversations_history(channel=channel.id, inclusive=True, **between)
    assert [message["text"] for message in answer["messages"]] == ["4", "3", "2"]


async def test_a_thread_is_read_from_its_first_message(slack: SlackSandbox, client: AsyncWebClient, alice: Person) -> None:
    channel = slack.add_channel("general", alice)
    parent = alice.writes("first", channel)
    for number in range(4):
        alice.writes(str(number), thread=parent)
    answer = await client.conversations_replies(channel=channel.id, ts=parent.ts, limit=2)
    assert ([message["text"] for message in answer["messages"]], answer["has_more"]) == (["first", "0"], True)
    cursor = answer["response_metadata"]["next_cursor"]
    answer = await client.conversations_replies(channel=channel.id, ts=parent.ts, cursor=cursor)
    assert ([message["text"] for message in answer["messages"]], answer["has_more"]) == (["1", "2", "3"], False)
    assert await error_of(client.conversations_replies(channel=channel.id, ts="1700000000.000000")) == "thread_not_found"
    assert await error_of(client.conversations_history(channel=channel.id, cursor="?")) == "invalid_cursor"
    assert await error_of(client.conversations_history(channel=channel.id, limit=-1)) == "invalid_limit"
    assert await error_of(client.conversations_history(channel=channel.id, oldest="noon")) == "invalid_ts_oldest"


async def test_metadata_is_read_by_who_asks_for_it(slack: SlackSandbox, client: AsyncWebClient) -> None:
    channel, metadata = slack.add_channel("general"), {"event_type": "turn", "event_payload": {"id": "t1"}}
    await client.chat_postMessage(channel=channel.id, text="hello", metadata=metadata)
    without = await client.conversations_history(channel=channel.id)
    assert "metadata" not in without["messages"][0]
    answer = await client.conversations_history(channel=channel.id, include_all_metadata=True)
    assert answer["messages"][0]["metadata"] == metadata


async def test_outside_the_marketplace_a_thread_is_read_once_a_minute_and_fifteen_messages_at_a_time(
    slack: SlackSandbox, client: AsyncWebClient, alice: Person
) -> None:
    slack.app.is_marketplace = False
    channel = slack.add_channel("general", alice)
    parent = alice.writes("first", channel)
    for number in range(20):
        alice.writes(str(number), thread=parent)
    answer = await client.conversations_replies(channel=channel.id, ts=parent.ts, limit=100)
    assert len(answer["messages"]) == 15
    limited = await refusal(client.conversations_replies(channel=channel.id, ts=parent.ts))
    assert (limited.response.status_code, limited.response.headers["Retry-After"]) == (429, "60")
    slack.clock.advance(60)
    await client.conversations_replies(channel=channel.id, ts=parent.ts)


async def test_direct_messages_are_opened_once(slack: SlackSandbox, client: AsyncWebClient, alice: Person) -> None:
    first = await client.conversations_open(users=alice.id)
    again = await client.conversations_open(users=[alice.id], return_im=True)
    assert first["channel"] == {"id": alice.direct_messages.id}
    assert (again["channel"]["id"], again["channel"]["user"]) == (alice.direct_messages.id, alice.id)
    assert (await client.conversations_open(channel=alice.direct_messages.id))["channel"] == first["channel"]
    bob = slack.add_person("Bob")
    assert await error_of(client.conversations_open(users=[alice.id, bob.id])) == "too_many_users"
    assert await error_of(client.conversations_open(users="U0NOBODY")) == "user_not_found"


async def test_channels_and_people_are_described(slack: SlackSandbox, client: AsyncWebClient, alice: Person) -> None:
    channel = slack.add_channel("general", alice, slack.add_person("Bob"), is_private=True)
    shown = (await client.conversations_info(channel=channel.id, include_num_members=True))["channel"]
    assert (shown["name"], shown["is_private"], shown["is_member"], shown["num_members"]) == ("general", True, True, 3)
    pages = [page["members"] async for page in await client.conversations_members(channel=channel.id, limit=2)]
    assert [len(page) for page in pages] == [2, 1]
    user = (await client.users_info(user=alice.id))["user"]
    assert (user["real_name"], user["is_bot"], user["team_id"]) == ("Alice", False, slack.workspace.id)
    bot_user = slack.installation().bot_user
    assert (await client.users_info(user=bot_user.id))["user"]["is_bot"] is True


async def test_each_kind_of_channel_has_a_scope_of_its_own(slack: SlackSandbox, alice: Person) -> None:
    app = slack.add_app(App(id="A2", client_id="2", name="Other", app_token="xapp-2", bot_scopes=frozenset({"im:history"})))
    slack.install(app)
    client = AsyncWebClient(slack.bot_token(app=app), base_url=slack.api_url)
    refused = await refusal(client.conversations_history(channel=slack.add_channel("general").id))
    assert (refused.response["error"], refused.response["needed"]) == ("missing_scope", "channels:history")
    dave = slack.add_person("Dave", app=app)
    await client.conversations_history(channel=dave.direct_messages.id)
    assert await error_of(client.conversations_history(channel=alice.direct_messages.id)) == "channel_not_found"


async def test_a_reaction_is_given_once_and_taken_back_once(slack: SlackSandbox, client: AsyncWebClient, alice: Person) -> None:
    message = alice.writes("hello")
    reaction = {"channel": message.channel.id, "timestamp": message.ts, "name": "eyes"}
    await client.reactions_add(**reaction)
    assert message.reactions == {"eyes": [slack.installation().bot_user.id]}
    shown = (await client.conversations_history(channel=message.channel.id))["messages"][0]
    assert shown["reactions"] == [{"name": "eyes", "users": [slack.installation().bot_user.id], "count": 1}]
    assert await error_of(client.reactions_add(**reaction)) == "already_reacted"
    await client.reactions_remove(**reaction)
    assert await error_of(client.reactions_remove(**reaction)) == "no_reaction"
    assert await error_of(client.reactions_add(**reaction | {"name": "no spaces"})) == "invalid_name"
    assert message.reactions == {}
    assert [each.event_type for each in slack.deliveries[1:]] == ["reaction_added", "reaction_removed"]
