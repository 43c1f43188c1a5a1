"""Slack's limits on blocks: how many, how long, and which fields must be there.

Covers the blocks and elements that a bot like this one uses; of other kinds only the name is checked.
"""

from collections.abc import Iterator
from typing import Any

from bot.channels.slack.sandbox.world import Json

MOST_IN_MESSAGE = 50
MOST_IN_VIEW = 100
MOST_MARKDOWN_CHARACTERS = 12_000

_OTHER_BLOCKS = {
    *("alert", "call", "card", "carousel", "container", "data_table", "data_visualization", "divider", "file", "image", "plan"),
    *("rich_text", "table", "task_card", "video"),
}
_CHOICES = {
    *("static_select", "multi_static_select", "radio_buttons", "checkboxes", "overflow"),
}
_OTHER_ELEMENTS = {
    *("channels_select", "conversations_select", "datepicker", "datetimepicker", "email_text_input", "external_select"),
    *("file_input", "icon_button", "image", "multi_users_select", "number_input", "timepicker", "url_text_input"),
    *("users_select", "workflow_button"),
}


def faults_of_blocks(blocks: list[Json], most: int, path: str = "/blocks") -> list[str]:
    """What Slack would say against them; empty when it would take them."""
    return [f"[ERROR] {fault}" for fault in _faults(blocks, most, path)]


def _faults(blocks: list[Json], most: int, path: str) -> Iterator[str]:
    if len(blocks) > most:
        yield f"no more than {most} items allowed [json-pointer:{path}]"
    ids = [block["block_id"] for block in blocks if block.get("block_id")]
    for block_id in {block_id for block_id in ids if ids.count(block_id) > 1}:
        yield f"`block_id` {block_id} already exists for this view or message [json-pointer:{path}]"
    markdown = sum(len(str(block.get("text", ""))) for block in blocks if block.get("type") == "markdown")
    if markdown > MOST_MARKDOWN_CHARACTERS:
        yield f"must be less than {MOST_MARKDOWN_CHARACTERS + 1} characters [json-pointer:{path}]"
    for number, block in enumerate(blocks):
        where = f"{path}/{number}"
        yield from _length(block.get("block_id"), 255, f"{where}/block_id")
        yield from _block_faults(block, where)


def _block_faults(block: Json, where: str) -> Iterator[str]:
    match block.get("type"):
        case "section":
            yield from _section_faults(block, where)
        case "header":
            yield from _text_faults(block.get("text"), 150, f"{where}/text")
        case "markdown":
            if not isinstance(block.get("text"), str):
                yield f"missing required field: text [json-pointer:{where}]"
        case "actions":
            yield from _elements_faults(block, 25, where)
        case "context_actions":
            yield from _elements_faults(block, 5, where)
        case "context":
            yield from _context_faults(block, where)
        case "input":
            yield from _text_faults(block.get("label"), 2000, f"{where}/label")
            yield from _element_faults(block.get("element"), f"{where}/element")
        case kind if kind not in _OTHER_BLOCKS:
            yield f"unsupported type: {kind} [json-pointer:{where}/type]"


def _section_faults(block: Json, where: str) -> Iterator[str]:
    fields = block.get("fields")
    if block.get("text") is None and not fields:
        yield f"missing required field: text or fields [json-pointer:{where}]"
    if block.get("text") is not None:
        yield from _text_faults(block["text"], 3000, f"{where}/text")
    if fields and len(fields) > 10:
        yield f"no more than 10 items allowed [json-pointer:{where}/fields]"
    for number, each in enumerate(fields or []):
        yield from _text_faults(each, 2000, f"{where}/fields/{number}")
    if block.get("accessory") is not None:
        yield from _element_faults(block["accessory"], f"{where}/accessory")


def _context_faults(block: Json, where: str) -> Iterator[str]:
    elements = block.get("elements") or []
    if not 1 <= len(elements) <= 10:
        yield f"must hold 1 to 10 items [json-pointer:{where}/elements]"
    for number, element in enumerate(elements):
        if element.get("type") != "image":
            yield from _text_faults(element, 3000, f"{where}/elements/{number}")


def _elements_faults(block: Json, most: int, where: str) -> Iterator[str]:
    elements = block.get("elements") or []
    if not 1 <= len(elements) <= most:
        yield f"must hold 1 to {most} items [json-pointer:{where}/elements]"
    for number, element in enumerate(elements):
        yield from _element_faults(element, f"{where}/elements/{number}")


def _element_faults(element: Any, where: str) -> Iterator[str]:
    if not isinstance(element, dict):
        yield f"missing required field: element [json-pointer:{where}]"
        return
    yield from _length(element.get("action_id"), 255, f"{where}/action_id")
    match element.get("type"):
        case "button":
            yield from _text_faults(element.get("text"), 75, f"{where}/text")
            yield from _length(element.get("value"), 2000, f"{where}/value")
        case "feedback_buttons":
            for side in ("positive_button", "negative_button"):
                button = element.get(side) or {}
                yield from _text_faults(button.get("text"), 75, f"{where}/{side}/text")
                yield from _length(button.get("value"), 2000, f"{where}/{side}/value")
        case "plain_text_input" | "rich_text_input":
            yield from _length((element.get("placeholder") or {}).get("text"), 150, f"{where}/placeholder/text")
        case kind if kind in _CHOICES:
            yield from _options_faults(element, where)
        case kind if kind not in _OTHER_ELEMENTS:
            yield f"unsupported type: {kind} [json-pointer:{where}/type]"


def _options_faults(element: Json, where: str) -> Iterator[str]:
    most = {"static_select": 100, "multi_static_select": 100, "overflow": 5}.get(element["type"], 10)
    options = element.get("options") or [
        option for group in element.get("option_groups") or [] for option in group.get("options", [])
    ]
    if not 1 <= len(options) <= most:
        yield f"must hold 1 to {most} items [json-pointer:{where}/options]"
    for number, option in enumerate(options):
        yield from _text_faults(option.get("text"), 75, f"{where}/options/{number}/text")
        yield from _length(option.get("value"), 150, f"{where}/options/{number}/value")


def _text_faults(text: Any, most: int, where: str) -> Iterator[str]:
    if not isinstance(text, dict) or text.get("type") not in ("plain_text", "mrkdwn"):
        yield f"must provide a text object [json-pointer:{where}]"
    elif not text.get("text"):
        yield f"must be more than 0 characters [json-pointer:{where}/text]"
    else:
        yield from _length(text["text"], most, f"{where}/text")


def _length(value: Any, most: int, where: str) -> Iterator[str]:
    if value is not None and len(str(value)) > most:
        yield f"must be less than {most + 1} characters [json-pointer:{where}]"


def actions_of(blocks: list[Json]) -> Iterator[tuple[Json, Json]]:
    """Every block with each of its elements that people can use."""
    for block in blocks:
        elements = [*(block.get("elements") or []), block.get("accessory"), block.get("element")]
        yield from ((block, element) for element in elements if isinstance(element, dict) and element.get("action_id"))
