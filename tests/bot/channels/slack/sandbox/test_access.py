"""Who may call which method: tokens, scopes and arguments, as the SDK's client sees it."""

import aiohttp
import pytest
from slack_sdk.web.async_client import AsyncWebClient

from bot.channels.slack.sandbox.people import Person
from bot.channels.slack.sandbox.server import SlackSandbox
from bot.channels.slack.sandbox.world import App
from tests.bot.channels.slack.sandbox.bots import error_of, refusal


async def test_a_token_names_the_bot(slack: SlackSandbox, client: AsyncWebClient) -> None:
    answer = await client.auth_test()
    installation = slack.installation()
    assert (answer["team_id"], answer["user_id"], answer["bot_id"]) == (
        slack.workspace.id,
        installation.bot_user.id,
        installation.bot_id,
    )
    assert "chat:write" in answer.headers["X-OAuth-Scopes"].split(",")


@pytest.mark.parametrize(("token", "error"), [(None, "not_authed"), ("xoxb-unknown", "invalid_auth")])
async def test_a_token_that_is_none_is_refused(slack: SlackSandbox, token: str | None, error: str) -> None:
    assert await error_of(AsyncWebClient(token, base_url=slack.api_url).auth_test()) == error


async def test_an_app_token_is_for_connections_alone(slack: SlackSandbox, client: AsyncWebClient) -> None:
    assert await error_of(client.auth_test(token=slack.app.app_token)) == "not_allowed_token_type"
    assert await error_of(client.apps_connections_open(app_token=slack.bot_token())) == "not_allowed_token_type"
    answer = await client.apps_connections_open(app_token=slack.app.app_token)
    assert answer["url"].startswith("ws://127.0.0.1:")


async def test_what_a_scope_is_missing_for_names_it(slack: SlackSandbox) -> None:
    app = slack.add_app(App(id="A2", client_id="2", name="Quiet", app_token="xapp-2", bot_scopes=frozenset({"users:read"})))
    slack.install(app)
    client = AsyncWebClient(slack.bot_token(app=app), base_url=slack.api_url)
    refused = await refusal(client.chat_postMessage(channel="C1", text="hello"))
    assert refused.response.data == {
        "ok": False,
        "error": "missing_scope",
        "needed": "chat:write",
        "provided": "users:read",
    }


async def test_missing_arguments_are_all_named(client: AsyncWebClient) -> None:
    refused = await refusal(client.api_call("chat.update", json={"text": "hello"}))
    assert refused.response["error"] == "invalid_arguments"
    assert refused.response["response_metadata"]["messages"] == [
        "[ERROR] missing required field: channel",
        "[ERROR] missing required field: ts",
    ]


async def test_an_unknown_method_is_named(client: AsyncWebClient) -> None:
    refused = await refusal(client.api_call("chat.sing"))
    assert (refused.response["error"], refused.response["req_method"]) == ("unknown_method", "chat.sing")


async def test_forms_and_json_are_the_same(slack: SlackSandbox, client: AsyncWebClient) -> None:
    channel = slack.add_channel("general")
    blocks = [{"type": "divider"}]
    await client.api_call("chat.postMessage", json={"channel": channel.id, "text": "hello", "blocks": blocks})
    form = {"channel": channel.id, "text": "hello", "blocks": '[{"type": "divider"}]'}
    await client.api_call("chat.postMessage", data=form)
    by_json, by_form = slack.messages
    assert by_json.blocks == by_form.blocks == blocks


@pytest.mark.parametrize(
    ("body", "error"), [("{", "invalid_json"), ("[]", "json_not_object"), ('{"text": 7}', "invalid_arguments")]
)
async def test_a_body_that_cannot_be_read_is_refused(slack: SlackSandbox, body: str, error: str) -> None:
    channel = slack.add_channel("general")
    headers = {"Authorization": f"Bearer {slack.bot_token()}", "Content-Type": "application/json"}
    url = f"{slack.api_url}chat.postMessage?channel={channel.id}"
    async with aiohttp.ClientSession() as session, session.post(url, data=body, headers=headers) as response:
        assert (await response.json())["error"] == error


@pytest.mark.parametrize(
    ("method", "arguments", "pointer"),
    [
        ("views.open", {"trigger_id": "1", "view": "no JSON"}, "/view"),
        ("views.open", {"trigger_id": "1", "view": []}, "/view"),
        ("assistant.threads.setSuggestedPrompts", {"channel_id": "?", "prompts": ["a"]}, "/prompts"),
        ("assistant.threads.setStatus", {"channel_id": "?", "thread_ts": "?", "loading_messages": [7]}, "/loading_messages"),
        ("conversations.history", {"channel": "?", "limit": "many"}, "/limit"),
        ("conversations.history", {"channel": "?", "inclusive": "maybe"}, "/inclusive"),
    ],
)
async def test_an_argument_of_another_type_is_named(
    client: AsyncWebClient, alice: Person, method: str, arguments: dict[str, object], pointer: str
) -> None:
    message = alice.writes("hello")
    places = {"channel": message.channel.id, "channel_id": message.channel.id, "thread_ts": message.ts}
    filled = {name: places[name] if value == "?" else value for name, value in arguments.items()}
    refused = await refusal(client.api_call(method, json=filled))
    assert refused.response["error"] == "invalid_arguments"
    assert refused.response["response_metadata"]["messages"][0].endswith(f"[json-pointer:{pointer}]")


async def test_calls_are_kept_in_order_without_their_tokens(slack: SlackSandbox, client: AsyncWebClient) -> None:
    await client.api_test(foo="bar")
    slack.clock.advance(5)
    await error_of(client.api_test(error="too_bad"))
    first, second = slack.calls
    assert (first.method, first.arguments, first.status, first.error) == ("api.test", {"foo": "bar"}, 200, None)
    assert (second.error, second.at - first.at) == ("too_bad", pytest.approx(5))


async def test_a_revoked_token_is_told_apart_from_an_app_that_is_gone(slack: SlackSandbox, client: AsyncWebClient) -> None:
    assert (await client.auth_revoke(test=True))["revoked"] is False
    await client.auth_test()
    assert (await client.auth_revoke())["revoked"] is True
    assert await error_of(client.auth_test()) == "token_revoked"
    fresh = AsyncWebClient(slack.bot_token(), base_url=slack.api_url)
    assert await error_of(fresh.apps_uninstall(client_id=slack.app.client_id, client_secret="?")) == "bad_client_secret"
    await fresh.apps_uninstall(client_id=slack.app.client_id, client_secret=slack.app.client_secret)
    assert await error_of(fresh.auth_test()) == "account_inactive"
    assert [delivery.event_type for delivery in slack.deliveries] == ["tokens_revoked", "tokens_revoked", "app_uninstalled"]
