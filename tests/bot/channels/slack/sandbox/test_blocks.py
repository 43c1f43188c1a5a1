"""Slack's limits on blocks, one by one."""

from typing import Any

import pytest
from slack_sdk.models.blocks import (
    ActionsBlock,
    ButtonElement,
    ContextActionsBlock,
    ContextBlock,
    DividerBlock,
    FeedbackButtonsElement,
    HeaderBlock,
    InputBlock,
    MarkdownBlock,
    MarkdownTextObject,
    Option,
    PlainTextInputElement,
    SectionBlock,
    StaticSelectElement,
)

from bot.channels.slack.sandbox.blocks import actions_of, faults_of_blocks

_TEXT = {"type": "plain_text", "text": "a"}
_LONG = {"type": "plain_text", "text": "a" * 3001}
_BUTTON = {"type": "button", "action_id": "go", "text": _TEXT}


def test_blocks_as_the_sdk_makes_them_are_taken() -> None:
    button = ButtonElement(text="Go", action_id="go", value="1")
    sides = {"text": _TEXT, "value": "a" * 2000}
    feedback = FeedbackButtonsElement(action_id="vote", positive_button=sides, negative_button=sides)
    select = StaticSelectElement(action_id="pick", placeholder="Pick", options=[Option(label="A", value="a")])
    blocks = [
        SectionBlock(text="a", fields=["b"], accessory=button),
        HeaderBlock(text="a"),
        MarkdownBlock(text="a" * 12_000),
        ContextBlock(elements=[MarkdownTextObject(text="a")]),
        ActionsBlock(elements=[button, select]),
        ContextActionsBlock(elements=[feedback]),
        InputBlock(label="a", element=PlainTextInputElement(action_id="text")),
        DividerBlock(),
    ]
    records = [block.to_dict() for block in blocks]
    assert faults_of_blocks(records, 50) == []
    assert [element["action_id"] for _, element in actions_of(records)] == ["go", "go", "pick", "vote", "text"]


@pytest.mark.parametrize(
    ("block", "path"),
    [
        ({"type": "song"}, "/blocks/0/type"),
        ({"type": "divider", "block_id": "a" * 256}, "/blocks/0/block_id"),
        ({"type": "section"}, "/blocks/0"),
        ({"type": "section", "text": "plain"}, "/blocks/0/text"),
        ({"type": "section", "text": {"type": "mrkdwn", "text": ""}}, "/blocks/0/text/text"),
        ({"type": "section", "text": _LONG}, "/blocks/0/text/text"),
        ({"type": "section", "fields": [_TEXT] * 11}, "/blocks/0/fields"),
        ({"type": "section", "text": _TEXT, "accessory": {"type": "song"}}, "/blocks/0/accessory/type"),
        ({"type": "header", "text": _LONG}, "/blocks/0/text/text"),
        ({"type": "markdown"}, "/blocks/0"),
        ({"type": "markdown", "text": "a" * 12_001}, "/blocks"),
        ({"type": "context", "elements": []}, "/blocks/0/elements"),
        ({"type": "actions", "elements": [_BUTTON] * 26}, "/blocks/0/elements"),
        ({"type": "context_actions", "elements": [_BUTTON] * 6}, "/blocks/0/elements"),
        ({"type": "actions", "elements": [{**_BUTTON, "text": _LONG}]}, "/blocks/0/elements/0/text/text"),
        ({"type": "actions", "elements": [{**_BUTTON, "value": "a" * 2001}]}, "/blocks/0/elements/0/value"),
        ({"type": "actions", "elements": [{**_BUTTON, "action_id": "a" * 256}]}, "/blocks/0/elements/0/action_id"),
        ({"type": "actions", "elements": [{"type": "static_select"}]}, "/blocks/0/elements/0/options"),
        ({"type": "context_actions", "elements": [{"type": "feedback_buttons"}]}, "/blocks/0/elements/0/positive_button/text"),
        ({"type": "input", "label": _TEXT}, "/blocks/0/element"),
    ],
)
def test_what_slack_would_not_take_is_named_by_its_place(block: dict[str, Any], path: str) -> None:
    assert faults_of_blocks([block], 50)[0].endswith(f"[json-pointer:{path}]")


def test_a_block_id_is_there_once() -> None:
    (fault,) = faults_of_blocks([{"type": "divider", "block_id": "a"}] * 2, 50)
    assert "already exists" in fault


def test_only_so_many_blocks_are_taken() -> None:
    assert faults_of_blocks([{"type": "divider"}] * 50, 50) == []
    assert faults_of_blocks([{"type": "divider"}] * 51, 50) == ["[ERROR] no more than 50 items allowed [json-pointer:/blocks]"]
