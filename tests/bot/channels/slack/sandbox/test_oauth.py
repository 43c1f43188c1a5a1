"""Installing in several workspaces, and tokens that expire and are rotated, with bolt's own OAuth flow."""

from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit

import aiohttp
import pytest
from slack_bolt.app.async_app import AsyncApp
from slack_bolt.oauth.async_oauth_flow import AsyncOAuthFlow
from slack_bolt.oauth.async_oauth_settings import AsyncOAuthSettings
from slack_bolt.request.async_request import AsyncBoltRequest
from slack_sdk.oauth.installation_store import FileInstallationStore
from slack_sdk.oauth.state_store import FileOAuthStateStore
from slack_sdk.oauth.token_rotation.async_rotator import AsyncTokenRotator
from slack_sdk.web.async_client import AsyncWebClient

from bot.channels.slack.sandbox.server import SlackSandbox
from bot.channels.slack.sandbox.world import App
from tests.bot.channels.slack.sandbox.bots import connected, error_of

# The SDK builds its header with what aiohttp is about to remove.
pytestmark = pytest.mark.filterwarnings("ignore:BasicAuth is deprecated:DeprecationWarning")

_REDIRECT_URI = "https://bot.example.org/slack/oauth_redirect"


@pytest.fixture
def anonymous(slack: SlackSandbox) -> AsyncWebClient:
    return AsyncWebClient(base_url=slack.api_url)


async def _exchange(slack: SlackSandbox, client: AsyncWebClient, code: str, **others: str) -> dict[str, object]:
    app = slack.app
    answer = await client.oauth_v2_access(client_id=app.client_id, client_secret=app.client_secret, code=code, **others)
    assert isinstance(answer.data, dict)
    return answer.data


async def test_each_workspace_has_its_own_bot_and_token(slack: SlackSandbox, anonymous: AsyncWebClient) -> None:
    globex = slack.add_workspace("Globex")
    granted = await _exchange(slack, anonymous, slack.add_person("Dave", globex).installs())
    assert granted["team"] == {"id": globex.id, "name": "Globex"}
    assert (granted["token_type"], granted["app_id"]) == ("bot", slack.app.id)
    assert "refresh_token" not in granted
    there = await anonymous.auth_test(token=str(granted["access_token"]))
    here = await anonymous.auth_test(token=slack.bot_token())
    assert (there["team_id"], there["user_id"]) == (globex.id, granted["bot_user_id"])
    assert here["user_id"] != there["user_id"]
    channel = slack.add_channel("general")
    call = anonymous.chat_postMessage(token=str(granted["access_token"]), channel=channel.id, text="hello")
    assert await error_of(call) == "channel_not_found"


async def test_a_code_counts_once_and_for_ten_minutes(slack: SlackSandbox, anonymous: AsyncWebClient) -> None:
    dave = slack.add_person("Dave")
    code = dave.installs(redirect_uri=_REDIRECT_URI)
    assert await error_of(_exchange(slack, anonymous, code)) == "bad_redirect_uri"
    await _exchange(slack, anonymous, code, redirect_uri=_REDIRECT_URI)
    assert await error_of(_exchange(slack, anonymous, code, redirect_uri=_REDIRECT_URI)) == "code_already_used"
    late = dave.installs()
    slack.clock.advance(600)
    assert await error_of(_exchange(slack, anonymous, late)) == "invalid_code"


async def test_only_the_app_itself_gets_tokens(slack: SlackSandbox, anonymous: AsyncWebClient) -> None:
    code = slack.add_person("Dave").installs()
    wrong = anonymous.oauth_v2_access(client_id=slack.app.client_id, client_secret="guessed", code=code)
    assert await error_of(wrong) == "bad_client_secret"
    assert await error_of(anonymous.oauth_v2_access(client_id="9.9", client_secret="?", code=code)) == "invalid_client_id"


async def test_a_token_is_given_for_a_code_alone(slack: SlackSandbox, anonymous: AsyncWebClient) -> None:
    secrets = {"client_id": slack.app.client_id, "client_secret": slack.app.client_secret}
    assert await error_of(anonymous.oauth_v2_access(**secrets)) == "invalid_arguments"
    other = slack.add_app(App(id="A2", client_id="2.2", name="Other", app_token="xapp-2"))
    theirs = {"client_id": other.client_id, "client_secret": other.client_secret}
    assert await error_of(anonymous.apps_uninstall(**theirs, token=slack.bot_token())) == "client_id_token_mismatch"


async def test_rotated_tokens_expire_and_are_refreshed_once(slack: SlackSandbox, anonymous: AsyncWebClient) -> None:
    slack.app.rotates_tokens = True
    granted = await _exchange(slack, anonymous, slack.add_person("Dave").installs())
    token, refresh_token = str(granted["access_token"]), str(granted["refresh_token"])
    assert (token[:7], granted["expires_in"]) == ("xoxe.xo", 43_200)
    await anonymous.auth_test(token=token)
    slack.clock.advance(43_200)
    assert await error_of(anonymous.auth_test(token=token)) == "token_expired"
    secrets = {"client_id": slack.app.client_id, "client_secret": slack.app.client_secret}
    refresh = {**secrets, "grant_type": "refresh_token", "refresh_token": refresh_token}
    renewed = await anonymous.oauth_v2_access(**refresh)
    await anonymous.auth_test(token=renewed["access_token"])
    assert renewed["refresh_token"] != refresh_token
    assert await error_of(anonymous.oauth_v2_access(**refresh)) == "invalid_refresh_token"


def _flow(slack: SlackSandbox, folder: Path) -> AsyncOAuthFlow:
    settings = AsyncOAuthSettings(
        client_id=slack.app.client_id,
        client_secret=slack.app.client_secret,
        scopes=["chat:write", "users:read"],
        authorization_url=slack.authorize_url,
        redirect_uri=_REDIRECT_URI,
        installation_store=FileInstallationStore(base_dir=str(folder / "installations"), client_id=slack.app.client_id),
        state_store=FileOAuthStateStore(expiration_seconds=600, base_dir=str(folder / "states"), client_id="1"),
    )
    return AsyncOAuthFlow(settings=settings, client=AsyncWebClient(base_url=slack.api_url))


async def test_bolts_flow_installs_and_its_rotator_renews(
    slack: SlackSandbox, anonymous: AsyncWebClient, tmp_path: Path
) -> None:
    slack.app.redirect_urls = frozenset({_REDIRECT_URI})
    slack.app.rotates_tokens = True
    dave = slack.add_person("Dave")
    flow = _flow(slack, tmp_path)
    state = await flow.issue_new_state(AsyncBoltRequest(body="", query="", headers={}))
    cookie = {"cookie": [f"{flow.settings.state_cookie_name}={state}"]}
    url = await flow.build_authorize_url(state, AsyncBoltRequest(body="", query="", headers={}))
    async with aiohttp.ClientSession() as browser, browser.get(url, allow_redirects=False) as redirect:
        location = redirect.headers["Location"]
    assert location.startswith(_REDIRECT_URI)
    assert parse_qs(urlsplit(location).query)["state"] == [state]
    arrived = AsyncBoltRequest(body="", query=urlsplit(location).query, headers=cookie)
    assert (await flow.handle_callback(arrived)).status == 200

    store = flow.settings.installation_store
    bot = await store.async_find_bot(enterprise_id=None, team_id=slack.workspace.id)
    assert bot is not None
    assert bot.bot_scopes == ["chat:write", "users:read"]
    assert (await anonymous.auth_test(token=bot.bot_token))["team_id"] == slack.workspace.id
    assert slack.installation().installer_id == dave.id
    rotator = AsyncTokenRotator(client_id=slack.app.client_id, client_secret=slack.app.client_secret, client=anonymous)
    renewed = await rotator.perform_bot_token_rotation(bot=bot, minutes_before_expiration=43_200)
    assert renewed is not None
    assert renewed.bot_token != bot.bot_token
    await anonymous.auth_test(token=renewed.bot_token)


async def test_a_redirect_that_the_app_does_not_name_is_refused(slack: SlackSandbox) -> None:
    query = {"client_id": slack.app.client_id, "scope": "chat:write", "redirect_uri": "https://elsewhere.example.org"}
    async with aiohttp.ClientSession() as browser, browser.get(slack.authorize_url, params=query) as response:
        assert response.status == 400


async def test_one_bot_answers_in_every_workspace_with_its_own_token(slack: SlackSandbox, tmp_path: Path) -> None:
    """Bolt finds the token by the team that the event names."""
    slack.app.redirect_urls = frozenset({_REDIRECT_URI})
    flow = _flow(slack, tmp_path)
    globex = slack.add_workspace("Globex")
    people = [slack.add_person("Alice"), slack.add_person("Dave", globex)]
    for person in people:
        installation = await flow.run_installation(person.installs(redirect_uri=_REDIRECT_URI))
        assert installation is not None
        await flow.store_installation(AsyncBoltRequest(body="", query="", headers={}), installation)
    app = AsyncApp(signing_secret=slack.app.signing_secret, client=AsyncWebClient(base_url=slack.api_url), oauth_flow=flow)

    @app.event("message")
    async def answer(event: dict[str, Any], say: Any) -> None:
        await say(text=f"Hello, {event['team']}")

    async with connected(slack, app):
        for person in people:
            person.writes("hello")
        await slack.until(lambda: all(len(person.sees()) == 2 for person in people))
        await slack.settled()
    assert [person.sees()[1].text for person in people] == [f"Hello, {slack.workspace.id}", f"Hello, {globex.id}"]
