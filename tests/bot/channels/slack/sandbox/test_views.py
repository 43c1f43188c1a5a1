"""Modals and App Home by the Web API alone: triggers, stacks, hashes, limits."""

from typing import Any

import pytest
from slack_sdk.models.blocks import DividerBlock, InputBlock, PlainTextInputElement
from slack_sdk.models.views import View
from slack_sdk.web.async_client import AsyncWebClient

from bot.channels.slack.sandbox.people import Person
from bot.channels.slack.sandbox.server import SlackSandbox
from tests.bot.channels.slack.sandbox.bots import error_of, refusal


def modal(title: str = "Feedback", **changes: Any) -> dict[str, Any]:
    reason = InputBlock(block_id="reason", label="Why?", element=PlainTextInputElement(action_id="text"))
    view = View(type="modal", title="Feedback", submit="Send", blocks=[reason]).to_dict()
    return {**view, "title": {"type": "plain_text", "text": title}, **changes}


@pytest.fixture
def trigger_id(slack: SlackSandbox, alice: Person) -> str:
    return slack.trigger(alice)


async def test_a_trigger_opens_one_modal(slack: SlackSandbox, client: AsyncWebClient, alice: Person, trigger_id: str) -> None:
    view = (await client.views_open(trigger_id=trigger_id, view=modal(private_metadata="turn 7")))["view"]
    assert alice.modal is not None
    assert (alice.modal.id, alice.modal.content["private_metadata"]) == (view["id"], "turn 7")
    assert (view["root_view_id"], view["previous_view_id"], view["app_id"]) == (view["id"], None, slack.app.id)
    assert await error_of(client.views_open(trigger_id=trigger_id, view=modal())) == "exchanged_trigger_id"
    assert await error_of(client.views_open(trigger_id="1.2.3", view=modal())) == "invalid_trigger_id"


async def test_a_trigger_lives_three_seconds(slack: SlackSandbox, client: AsyncWebClient, trigger_id: str) -> None:
    slack.clock.advance(3)
    assert await error_of(client.views_open(trigger_id=trigger_id, view=modal())) == "expired_trigger_id"
    assert slack.views == []


async def test_a_modal_that_slack_would_not_take_does_not_use_the_trigger_up(client: AsyncWebClient, trigger_id: str) -> None:
    for wrong, path in [
        (modal(title="a" * 25), "/view/title/text"),
        (modal(type="home"), "/view/type"),
        (modal(private_metadata="a" * 3001), "/view/private_metadata"),
        (modal(submit=None), "/view/submit"),
        (modal(blocks=[{"type": "divider"}] * 101), "/view/blocks"),
        (modal(blocks=None), "/view"),
    ]:
        refused = await refusal(client.views_open(trigger_id=trigger_id, view=wrong))
        assert refused.response["error"] == "invalid_arguments"
        assert f"[json-pointer:{path}]" in refused.response["response_metadata"]["messages"][0]
    await client.views_open(trigger_id=trigger_id, view=modal())


async def test_modals_are_stacked_three_deep(
    slack: SlackSandbox, client: AsyncWebClient, alice: Person, trigger_id: str
) -> None:
    assert await error_of(client.views_push(trigger_id=slack.trigger(alice), view=modal())) == "view_not_found"
    await client.views_open(trigger_id=trigger_id, view=modal("One"))
    for title in ("Two", "Three"):
        pushed = (await client.views_push(trigger_id=slack.trigger(alice, alice.modal), view=modal(title)))["view"]
        assert pushed["root_view_id"] == slack.views[0].id
        assert pushed["previous_view_id"] == slack.views[-2].id
    deeper = client.views_push(trigger_id=slack.trigger(alice, alice.modal), view=modal("Four"))
    assert await error_of(deeper) == "push_limit_reached"


async def test_a_view_is_updated_unless_it_has_changed(slack: SlackSandbox, client: AsyncWebClient, trigger_id: str) -> None:
    view = (await client.views_open(trigger_id=trigger_id, view=modal(external_id="feedback-7")))["view"]
    await client.views_update(external_id="feedback-7", hash=view["hash"], view=modal("Thanks", external_id="feedback-7"))
    late = client.views_update(view_id=view["id"], hash=view["hash"], view=modal("Too late"))
    assert await error_of(late) == "hash_conflict"
    (shown,) = slack.views
    assert (shown.content["title"]["text"], shown.earlier[0]["title"]["text"]) == ("Thanks", "Feedback")
    assert await error_of(client.views_update(view_id="V0NONE", view=modal())) == "not_found"


async def test_a_home_is_published_for_each_person(slack: SlackSandbox, client: AsyncWebClient, alice: Person) -> None:
    bob = slack.add_person("Bob")
    home = View(type="home", blocks=[{"type": "header", "text": {"type": "plain_text", "text": "Hello"}}])
    await client.views_publish(user_id=alice.id, view=home)
    await client.views_publish(user_id=bob.id, view=home)
    again = (await client.views_publish(user_id=alice.id, view=View(type="home", blocks=[DividerBlock()] * 2)))["view"]
    assert alice.home is not None
    assert bob.home is not None
    assert (again["id"], len(alice.home.blocks), len(bob.home.blocks)) == (alice.home.id, 2, 1)
    assert await error_of(client.views_publish(user_id=alice.id, view=modal())) == "invalid_arguments"
