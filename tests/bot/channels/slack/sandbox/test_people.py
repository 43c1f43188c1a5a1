"""What people do and how the app is told, in Slack's own words; bolt answers over both transports."""

import asyncio
from typing import Any

import aiohttp
import pytest
from slack_sdk.models.blocks import (
    ActionsBlock,
    ButtonElement,
    CheckboxesElement,
    ContextActionsBlock,
    DividerBlock,
    FeedbackButtonsElement,
    InputBlock,
    Option,
    StaticSelectElement,
)
from slack_sdk.models.views import View
from slack_sdk.web.async_client import AsyncWebClient
from slack_sdk.webhook.async_client import AsyncWebhookClient

from bot.channels.slack.sandbox.errors import ActionError
from bot.channels.slack.sandbox.people import Person
from bot.channels.slack.sandbox.server import SlackSandbox
from bot.channels.slack.sandbox.world import App
from tests.bot.channels.slack.sandbox.bots import Arrivals, bolt_app, connected, patient_app, reached
from tests.bot.channels.slack.sandbox.test_views import modal

both_transports = pytest.mark.parametrize("transport", ["socket", "http"])


def _events(slack: SlackSandbox) -> list[dict[str, Any]]:
    return [delivery.payload["event"] for delivery in slack.deliveries]


async def test_a_direct_message_is_told_as_slack_tells_it(slack: SlackSandbox, alice: Person) -> None:
    message = alice.writes("I lost my card")
    (delivery,) = slack.deliveries
    payload, event, installation = delivery.payload, delivery.payload["event"], slack.installation()
    assert (payload["type"], payload["team_id"], payload["api_app_id"]) == ("event_callback", slack.workspace.id, slack.app.id)
    assert payload["event_time"] == int(slack.clock.now())
    assert payload["authorizations"] == [
        {
            "enterprise_id": None,
            "team_id": slack.workspace.id,
            "user_id": installation.bot_user.id,
            "is_bot": True,
            "is_enterprise_install": False,
        }
    ]
    assert {name: event[name] for name in ("type", "user", "text", "ts", "event_ts", "channel", "channel_type", "team")} == {
        "type": "message",
        "user": alice.id,
        "text": "I lost my card",
        "ts": message.ts,
        "event_ts": message.ts,
        "channel": alice.direct_messages.id,
        "channel_type": "im",
        "team": slack.workspace.id,
    }
    assert event["client_msg_id"] == message.client_msg_id
    assert event["blocks"][0]["elements"][0]["elements"] == [{"type": "text", "text": "I lost my card"}]
    assert "thread_ts" not in event


async def test_a_mention_in_a_channel_is_told_twice(slack: SlackSandbox, alice: Person) -> None:
    channel = slack.add_channel("general", alice)
    message = alice.mentions("when do you open?", channel)
    plain, mention = slack.deliveries
    assert [delivery.event_type for delivery in (plain, mention)] == ["message", "app_mention"]
    assert plain.payload["event"]["ts"] == mention.payload["event"]["ts"] == message.ts
    assert plain.event_id != mention.event_id
    assert plain.payload["event"]["channel_type"] == "channel"
    bot_id = slack.installation().bot_user.id
    assert mention.payload["event"]["text"] == f"<@{bot_id}> when do you open?"
    assert mention.payload["event"]["blocks"][0]["elements"][0]["elements"][0] == {"type": "user", "user_id": bot_id}


async def test_a_mention_in_direct_messages_is_told_once(slack: SlackSandbox, alice: Person) -> None:
    alice.mentions("hello")
    assert [event["type"] for event in _events(slack)] == ["message"]


async def test_only_channels_that_the_app_is_in_are_told_of(slack: SlackSandbox, alice: Person) -> None:
    alice.mentions("hello", slack.add_channel("quiet", alice, has_app=False))
    assert slack.deliveries == []
    slack.app.bot_events = frozenset({"app_mention"})
    alice.mentions("hello", slack.add_channel("own", alice, is_private=True))
    alice.writes("hello")
    assert [event["type"] for event in _events(slack)] == ["app_mention"]


async def test_a_thread_is_told_with_its_first_message(slack: SlackSandbox, alice: Person) -> None:
    channel = slack.add_channel("general", alice)
    first = alice.writes("first", channel)
    reply = alice.writes("second", thread=first)
    alice.writes("third", thread=reply)
    for event in _events(slack)[1:]:
        assert (event["thread_ts"], event["parent_user_id"]) == (first.ts, alice.id)


async def test_times_are_names_that_are_unique_and_rise(slack: SlackSandbox, alice: Person) -> None:
    times = [alice.writes("hello").ts for _ in range(50)]
    assert times == sorted(set(times))
    assert all(len(seconds) == 10 and len(micros) == 6 for seconds, micros in (ts.split(".") for ts in times))


async def test_changed_and_deleted_messages_are_told(slack: SlackSandbox, alice: Person) -> None:
    message = alice.writes("I lost my crad")
    alice.edits(message, "I lost my card")
    alice.deletes(message)
    posted, changed, deleted = _events(slack)
    assert (changed["subtype"], changed["channel_type"], changed["hidden"]) == ("message_changed", "im", True)
    assert changed["previous_message"]["text"] == posted["text"] == "I lost my crad"
    assert (changed["message"]["text"], changed["message"]["ts"]) == ("I lost my card", posted["ts"])
    assert (deleted["subtype"], deleted["deleted_ts"]) == ("message_deleted", posted["ts"])
    assert posted["ts"] < changed["ts"] < deleted["ts"]
    assert alice.sees() == []


async def test_the_bots_own_messages_are_told_with_its_bot_id(
    slack: SlackSandbox, client: AsyncWebClient, alice: Person
) -> None:
    await client.chat_postMessage(channel=alice.direct_messages.id, text="hello")
    (event,) = _events(slack)
    assert (event["bot_id"], event["app_id"]) == (slack.installation().bot_id, slack.app.id)


async def test_home_and_reactions_are_told(slack: SlackSandbox, client: AsyncWebClient, alice: Person) -> None:
    message = alice.writes("hello")
    alice.reacts(message, "eyes")
    alice.opens_home("messages")
    await client.views_publish(user_id=alice.id, view=View(type="home", blocks=[DividerBlock()]))
    alice.opens_home()
    _, reaction, messages, home = _events(slack)
    assert (reaction["type"], reaction["reaction"], reaction["item"]["ts"]) == ("reaction_added", "eyes", message.ts)
    assert (messages["tab"], messages["channel"], "view" in messages) == ("messages", alice.direct_messages.id, False)
    assert (home["tab"], home["view"]["type"]) == ("home", "home")


async def test_uninstalling_is_told_by_two_events_and_ends_the_rest(slack: SlackSandbox, alice: Person) -> None:
    alice.uninstalls()
    revoked, uninstalled = _events(slack)
    assert revoked["tokens"] == {"oauth": [], "bot": [slack.installation().bot_user.id]}
    assert uninstalled["type"] == "app_uninstalled"
    with pytest.raises(ActionError, match="not installed"):
        alice.writes("hello")


@both_transports
async def test_a_click_opens_a_modal_and_its_submission_closes_it(slack: SlackSandbox, alice: Person, transport: str) -> None:
    app, submitted = bolt_app(slack), list[dict[str, Any]]()

    @app.command("/frontdesk")
    async def offer(ack: Any, say: Any) -> None:
        await ack()
        buttons = {"text": {"type": "plain_text", "text": "?"}}
        feedback = FeedbackButtonsElement(
            action_id="vote", positive_button={**buttons, "value": "good"}, negative_button={**buttons, "value": "bad"}
        )
        await say(text="How was that?", blocks=[ContextActionsBlock(block_id="votes", elements=[feedback])])

    @app.action("vote")
    async def ask_why(ack: Any, body: dict[str, Any], client: AsyncWebClient) -> None:
        await ack()
        await client.views_open(trigger_id=body["trigger_id"], view=modal(callback_id="why", notify_on_close=True))

    @app.view("why")
    async def take(ack: Any, body: dict[str, Any]) -> None:
        entered = body["view"]["state"]["values"]["reason"]["text"]["value"]
        if entered == "?":
            await ack(response_action="errors", errors={"reason": "Please say more."})
        elif entered == "go on":
            await ack(response_action="push", view=modal("More", callback_id="why"))
        elif entered == "change":
            await ack(response_action="update", view=modal("Changed", callback_id="why"))
        elif entered == "all":
            await ack(response_action="clear")
        else:
            submitted.append(body)
            await ack()

    @app.event("message")
    async def ignore() -> None:
        pass

    async with reached(slack, app, transport):
        await alice.uses("/frontdesk", channel=alice.direct_messages)
        await slack.until(alice.sees)
        clicked = await alice.clicks(alice.sees()[-1], "vote", "bad")
        assert clicked.payload["actions"][0] | {"action_ts": ""} == {
            "type": "feedback_buttons",
            "action_id": "vote",
            "block_id": "votes",
            "action_ts": "",
            "value": "bad",
            "text": {"type": "plain_text", "text": "?"},
        }
        await slack.until(lambda: alice.modal)
        with pytest.raises(ActionError, match="must be filled in"):
            await alice.submits()
        with pytest.raises(ActionError, match="no fields"):
            await alice.submits({"reason": "a", "rating": "5"})
        assert (await alice.submits({"reason": "?"})).errors == {"reason": "Please say more."}
        await alice.submits({"reason": "change"})
        await alice.submits({"reason": "go on"})
        assert [view.content["title"]["text"] for view in slack.views] == ["Changed", "More"]
        await alice.submits({"reason": "wrong hours"})
        assert alice.modal is slack.views[0]
        await alice.submits({"reason": "all"})
    assert alice.modal is None
    assert [body["view"]["id"] for body in submitted] == [slack.views[1].id]


@both_transports
async def test_a_response_url_answers_posts_and_replaces(slack: SlackSandbox, alice: Person, transport: str) -> None:
    app = bolt_app(slack)

    @app.command("/frontdesk")
    async def offer(ack: Any, respond: Any) -> None:
        await ack("One moment.")
        select = StaticSelectElement(action_id="pick", options=[Option(label="A", value="a"), Option(label="B", value="b")])
        await respond(text="Pick one", blocks=[ActionsBlock(elements=[select])])

    @app.action("pick")
    async def picked(ack: Any, action: dict[str, Any], respond: Any) -> None:
        await ack()
        await respond(text=f"You picked {action['selected_option']['value']}", replace_original=True)
        await respond(delete_original=True)

    bob = slack.add_person("Bob")
    channel = slack.add_channel("general", alice, bob)
    async with reached(slack, app, transport):
        await alice.uses("/frontdesk", "help", channel)
        await slack.until(lambda: len(alice.sees(channel)) == 2)
        moment, offered = sorted(alice.sees(channel), key=lambda message: message.text)
        assert moment.text == "One moment."
        assert bob.sees(channel) == []
        with pytest.raises(ActionError, match="offers no choice 'c'"):
            await alice.clicks(offered, "pick", "c")
        with pytest.raises(ActionError, match="nothing to click"):
            await alice.clicks(offered, "other")
        with pytest.raises(ActionError, match="sees no app's message"):
            await bob.clicks(offered, "pick", "a")
        await alice.clicks(offered, "pick", "b")
        await slack.until(lambda: offered.is_deleted)
    assert offered.text == "You picked b"
    assert alice.sees(channel) == [moment]
    assert [edit.text for edit in offered.edits] == ["Pick one"]


async def test_a_response_url_counts_five_times_within_half_an_hour(slack: SlackSandbox, alice: Person) -> None:
    app, urls = bolt_app(slack), Arrivals[str]()

    @app.shortcut("ask_frontdesk")
    async def take(ack: Any, body: dict[str, Any]) -> None:
        await ack()
        urls.append(body["response_url"])

    @app.event("message")
    async def ignore() -> None:
        pass

    async with connected(slack, app):
        question = alice.writes("hello")
        for _ in range(2):
            shortcut = await alice.chooses_shortcut("ask_frontdesk", question)
            assert shortcut.payload["message"]["ts"] == question.ts
        first, second = (AsyncWebhookClient(url) for url in await urls.first(2))
        assert (await first.send(text="")).status_code == 400
        async with aiohttp.ClientSession() as session, session.post(first.url, data="{") as response:
            assert await response.json() == {"ok": False, "error": "invalid_payload"}
        # What is refused for its content is a use as well.
        answers = [await first.send(text="hello") for _ in range(5)]
        assert [(answer.status_code, answer.body) for answer in answers[:4]] == [(200, "ok")] * 4
        assert answers[4].status_code == 404
        slack.clock.advance(1800)
        assert (await second.send(text="hello")).status_code == 404
        await slack.settled()


async def test_buttons_in_a_home_are_clicked_and_modals_closed(
    slack: SlackSandbox, client: AsyncWebClient, alice: Person
) -> None:
    app, closed = bolt_app(slack), Arrivals[dict[str, Any]]()

    @app.action("more")
    async def more(ack: Any, body: dict[str, Any], client: AsyncWebClient) -> None:
        await ack()
        await client.views_open(trigger_id=body["trigger_id"], view=modal(callback_id="why", notify_on_close=True))

    @app.view_closed("why")
    async def gone(ack: Any, body: dict[str, Any]) -> None:
        await ack()
        closed.append(body)

    home = View(type="home", blocks=[ActionsBlock(elements=[ButtonElement(action_id="more", text="More", value="7")])])
    async with connected(slack, app):
        await client.views_publish(user_id=alice.id, view=home)
        assert alice.home is not None
        clicked = await alice.clicks(alice.home, "more")
        assert (clicked.payload["container"]["type"], clicked.payload["actions"][0]["value"]) == ("view", "7")
        await slack.until(lambda: alice.modal)
        await alice.closes()
        (told,) = await closed.first(1)
    assert told["is_cleared"] is False
    with pytest.raises(ActionError, match="no modal open"):
        await alice.closes()


async def test_a_form_is_filled_in_as_its_fields_ask(slack: SlackSandbox, client: AsyncWebClient, alice: Person) -> None:
    app = bolt_app(slack)

    @app.view("form")
    async def take(ack: Any, body: dict[str, Any]) -> None:
        broken = body["view"]["state"]["values"]["topic"]["pick"]["selected_option"]["value"] == "b"
        await (ack(response_action="update", view=modal("a" * 25)) if broken else ack())

    options = [Option(label="A", value="a"), Option(label="B", value="b")]
    form = modal(
        callback_id="form",
        clear_on_close=True,
        blocks=[
            DividerBlock().to_dict(),
            InputBlock(block_id="topic", label="?", element=StaticSelectElement(action_id="pick", options=options)).to_dict(),
            InputBlock(
                block_id="tags", label="?", element=CheckboxesElement(action_id="tick", options=options), optional=True
            ).to_dict(),
        ],
    )
    async with connected(slack, app):
        await client.views_open(trigger_id=slack.trigger(alice), view=form)
        with pytest.raises(ActionError, match="offers no choice 'c'"):
            await alice.submits({"topic": "c"})
        with pytest.raises(ActionError, match="the app's answer is refused: invalid_arguments"):
            await alice.submits({"topic": "b"})
        submission = await alice.submits({"topic": "a", "tags": "b"})
        values = submission.delivery.payload["view"]["state"]["values"]
        assert values["topic"]["pick"]["selected_option"]["value"] == "a"
        assert [option["value"] for option in values["tags"]["tick"]["selected_options"]] == ["b"]
        await client.views_open(trigger_id=slack.trigger(alice), view=form)
        await client.views_push(trigger_id=slack.trigger(alice, alice.modal), view={**form, "callback_id": "other"})
        await alice.closes()
    assert alice.modal is None


async def test_a_form_that_nobody_takes_stays_open(slack: SlackSandbox, client: AsyncWebClient, alice: Person) -> None:
    await client.views_open(trigger_id=slack.trigger(alice), view=modal())
    submitting = asyncio.create_task(alice.submits({"reason": "wrong"}))
    await slack.until(lambda: slack.deliveries and slack.deliveries[0].attempts)
    slack.clock.advance(3)
    assert not (await submitting).delivery.is_acknowledged
    assert alice.modal is not None


async def test_an_interaction_that_is_not_acknowledged_is_not_sent_again(slack: SlackSandbox, alice: Person) -> None:
    async with connected(slack, bolt_app(slack)):
        slack.app.commands |= {"/unheard"}
        using = asyncio.create_task(alice.uses("/unheard"))
        await slack.until(lambda: slack.deliveries and slack.deliveries[0].attempts)
        slack.clock.advance(3)
        delivery = await using
    assert not delivery.is_acknowledged
    assert len(delivery.attempts) == 1


async def test_people_cannot_do_what_slack_would_not_let_them(slack: SlackSandbox, alice: Person) -> None:
    bob = slack.add_person("Bob")
    channel = slack.add_channel("general", bob)
    theirs = bob.writes("hello", channel)
    with pytest.raises(ActionError, match="Alice is not in general"):
        alice.writes("hello", channel)
    with pytest.raises(ActionError, match="not Alice's message"):
        alice.edits(theirs, "other")
    with pytest.raises(ActionError, match="no command /other"):
        await alice.uses("/other")
    with pytest.raises(ActionError, match="no shortcut other"):
        await alice.chooses_shortcut("other", theirs)


async def test_workspaces_do_not_see_each_other(slack: SlackSandbox, alice: Person) -> None:
    globex = slack.add_workspace("Globex")
    slack.install(workspace=globex)
    dave = slack.add_person("Dave", globex)
    async with connected(slack, patient_app(slack)):
        dave.writes("hello")
        alice.writes("hello")
        await slack.settled()
    assert [delivery.payload["team_id"] for delivery in slack.deliveries] == [globex.id, slack.workspace.id]
    assert slack.bot_token(globex) != slack.bot_token()
    other = slack.add_app(App(id="A2", client_id="2", name="Other", app_token="xapp-2"))
    assert other.id not in globex.installations
