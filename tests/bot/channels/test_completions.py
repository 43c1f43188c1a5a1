"""Log probabilities, several choices and JSON over real connections, through the official `openai` client, unchanged."""

import asyncio
import json
import math
import re
import sqlite3
from collections.abc import Iterator
from contextlib import closing
from enum import Enum
from typing import Any

import httpx
import jsonschema_rs
import openai
import pytest
from openai import OpenAI
from openai.types.chat import ChatCompletion, ChatCompletionChunk, ChatCompletionTokenLogprob
from pydantic import BaseModel, Field

from tests.bot.channels.test_http import ask, check_refusal, metric, stream, text_of, wait_until, who
from tests.bot.conftest import ServingHere
from tests.bot.service import RunningService


@pytest.fixture(scope="module")
def client(tiny_service: RunningService) -> Iterator[OpenAI]:
    with tiny_service.openai as client:
        yield client


@pytest.fixture(scope="module")
def http(tiny_service: RunningService) -> Iterator[httpx.Client]:
    with tiny_service.http as client:
        yield client


def texts_of(answer: ChatCompletion) -> list[str]:
    return [choice.message.content or "" for choice in answer.choices]


def tokens_of(answer: ChatCompletion, index: int = 0) -> list[ChatCompletionTokenLogprob]:
    logprobs = answer.choices[index].logprobs
    assert logprobs is not None
    assert logprobs.content is not None
    assert logprobs.refusal is None
    return logprobs.content


def said(tokens: list[ChatCompletionTokenLogprob]) -> str:
    return b"".join(bytes(token.bytes or []) for token in tokens).decode(errors="replace")


def by_choice(chunks: list[ChatCompletionChunk]) -> dict[int, list[Any]]:
    """The choices of all chunks, by their index."""
    found: dict[int, list[Any]] = {}
    for choice in [choice for chunk in chunks for choice in chunk.choices]:
        found.setdefault(choice.index, []).append(choice)
    return found


# Log probabilities.


def test_every_token_is_told_with_its_log_probability(client: OpenAI) -> None:
    answer = ask(client, "Hello", max_tokens=12, logprobs=True, top_logprobs=3)
    tokens = tokens_of(answer)
    assert len(tokens) == answer.usage.completion_tokens == 12  # type: ignore[union-attr]
    assert said(tokens) == text_of(answer)
    for token in tokens:
        assert token.token == bytes(token.bytes or []).decode(errors="replace")
        assert len(token.top_logprobs) == 3
        ordered = [other.logprob for other in token.top_logprobs]
        assert ordered == sorted(ordered, reverse=True)
        assert token.logprob <= ordered[0] < 0
        assert sum(math.exp(value) for value in ordered) <= 1
    assert ask(client, "Hello", max_tokens=12).choices[0].logprobs is None
    assert ask(client, "Hello", max_tokens=12, logprobs=False).choices[0].logprobs is None


def test_log_probabilities_come_with_no_alternatives_unless_they_are_asked_for(client: OpenAI) -> None:
    whole = tokens_of(ask(client, "Hello", logprobs=True, top_logprobs=2))
    plain = tokens_of(ask(client, "Hello", logprobs=True))
    assert [token.top_logprobs for token in plain] == [[]] * 4
    assert [token.logprob for token in plain] == pytest.approx([token.logprob for token in whole])


def test_log_probabilities_are_the_models_own_whatever_the_temperature(client: OpenAI) -> None:
    cold, hot = (
        tokens_of(ask(client, "Hello", max_tokens=1, temperature=temperature, logprobs=True, top_logprobs=20))[0]
        for temperature in (0, 2)
    )
    assert [other.token for other in cold.top_logprobs] == [other.token for other in hot.top_logprobs]
    assert [other.logprob for other in cold.top_logprobs] == pytest.approx([other.logprob for other in hot.top_logprobs])


def test_streamed_log_probabilities_are_those_of_the_whole_answer(client: OpenAI) -> None:
    """The random model writes half characters as often as whole ones: their tokens come with the text they are a part of."""
    more = {"max_tokens": 60, "temperature": 1.5, "seed": 5, "logprobs": True, "top_logprobs": 2}
    whole = ask(client, "Hello", **more)
    choices = by_choice(stream(client, "Hello", **more))[0]
    streamed = [token for choice in choices if choice.logprobs for token in choice.logprobs.content]
    assert [token.token for token in streamed] == [token.token for token in tokens_of(whole)]
    assert [token.logprob for token in streamed] == pytest.approx([token.logprob for token in tokens_of(whole)])
    assert any("\ufffd" in token.token for token in streamed)
    for choice in choices:
        if choice.delta.content:
            assert choice.logprobs.content  # no text without its tokens


def test_tokens_of_what_is_hidden_are_not_told(client: OpenAI) -> None:
    plain = tokens_of(ask(client, "Hello", max_tokens=20, logprobs=True))
    stop = plain[8].token + plain[9].token
    assert "\ufffd" not in stop
    answer = ask(client, "Hello", max_tokens=20, logprobs=True, stop=stop)
    assert answer.choices[0].finish_reason == "stop"
    assert [token.token for token in tokens_of(answer)] == [token.token for token in plain[:8]]
    assert said(tokens_of(answer)) == text_of(answer)
    assert answer.usage.completion_tokens == 10  # type: ignore[union-attr]


# Several choices.


def test_several_choices_are_each_drawn_with_a_seed_of_their_own(client: OpenAI) -> None:
    more = {"max_tokens": 12, "temperature": 1.5}
    answer = ask(client, "Hello", n=3, seed=40, **more)
    assert [choice.index for choice in answer.choices] == [0, 1, 2]
    assert [choice.finish_reason for choice in answer.choices] == ["length"] * 3
    alone = [ask(client, "Hello", seed=40 + index, **more) for index in range(3)]
    assert texts_of(answer) == [text_of(one) for one in alone]
    assert len(set(texts_of(answer))) == 3
    assert answer.usage is not None
    assert alone[0].usage is not None
    assert answer.usage.prompt_tokens == alone[0].usage.prompt_tokens
    assert answer.usage.completion_tokens == 36
    assert answer.usage.total_tokens == answer.usage.prompt_tokens + 36
    unseeded = ask(client, "Hello", n=8, **more)
    assert len(set(texts_of(unseeded))) == 8


def test_streamed_choices_come_interleaved_and_whole(client: OpenAI) -> None:
    more = {"n": 3, "seed": 40, "max_tokens": 12, "temperature": 1.5, "logprobs": True, "top_logprobs": 1}
    whole = ask(client, "Hello", **more)
    chunks = stream(client, "Hello", stream_options={"include_usage": True}, **more)
    choices = by_choice(chunks)
    assert sorted(choices) == [0, 1, 2]
    for index, parts in choices.items():
        assert "".join(part.delta.content or "" for part in parts) == texts_of(whole)[index]
        assert [part.delta.role for part in parts] == ["assistant"] + [None] * (len(parts) - 1)
        assert [part.finish_reason for part in parts] == [None] * (len(parts) - 1) + ["length"]
        streamed = [token.token for part in parts if part.logprobs for token in part.logprobs.content]
        assert streamed == [token.token for token in tokens_of(whole, index)]
    order = [choice.index for chunk in chunks for choice in chunk.choices if choice.delta.content]
    assert order != sorted(order)  # together, not one after the other
    assert [chunk.usage for chunk in chunks[:-1]] == [None] * (len(chunks) - 1)
    assert chunks[-1].usage == whole.usage
    assert len({chunk.id for chunk in chunks}) == len({chunk.created for chunk in chunks}) == 1
    assert who(chunks[0])["turn_id"] == who(chunks[-2])["turn_id"]


def test_each_choice_has_a_finish_reason_of_its_own(client: OpenAI) -> None:
    more = {"max_tokens": 12, "temperature": 1.5, "seed": 40}
    texts = texts_of(ask(client, "Hello", n=3, **more))
    stop = next(text[6:9] for text in texts[1:2] if text[6:9] not in texts[0] and text[6:9] not in texts[2])
    answer = ask(client, "Hello", n=3, stop=stop, **more)
    assert [choice.finish_reason for choice in answer.choices] == ["length", "stop", "length"]
    assert texts_of(answer) == [texts[0], texts[1][: texts[1].index(stop)], texts[2]]
    parts = by_choice(stream(client, "Hello", n=3, stop=stop, **more))
    assert [parts[index][-1].finish_reason for index in range(3)] == ["length", "stop", "length"]


def test_the_first_choice_is_the_turns_answer_and_the_others_are_kept_beside_it(
    client: OpenAI, tiny_service: RunningService
) -> None:
    question = "May I have three answers, logged?"
    answer = ask(client, question, model="auto", n=3, temperature=1.5, max_tokens=9)
    with closing(sqlite3.connect(tiny_service.data_dir / "conversations.db")) as database:
        rows = database.execute("SELECT answer, alternatives FROM turns WHERE question = ?", (question,)).fetchall()
    ((first, others),) = rows
    assert [first, *json.loads(others)] == texts_of(answer)
    continued = ask(client, question, texts_of(answer)[0], "And then?")
    assert who(continued)["conversation_id"] == who(answer)["conversation_id"]
    other = ask(client, question, texts_of(answer)[1], "And then?")
    assert who(other)["conversation_id"] != who(answer)["conversation_id"]


def test_a_clarifying_question_is_every_choice(client: OpenAI) -> None:
    answer = ask(client, "What is the capital of Mongolia?", model="auto", n=2)
    assert who(answer)["domain"] is None
    assert len(set(texts_of(answer))) == 1
    parts = by_choice(stream(client, "What is the capital of Mongolia?", model="auto", n=2))
    assert ["".join(part.delta.content or "" for part in parts[index]) for index in range(2)] == texts_of(answer)


@pytest.mark.parametrize("streaming", [False, True])
async def test_a_refused_choice_refuses_them_all(serving_here: ServingHere, streaming: bool) -> None:
    body = {"model": "banking", "messages": [{"role": "user", "content": "Hello"}], "n": 4, "stream": streaming}
    async with serving_here(max_batch=1, max_waiting=2) as here:
        refused = await here.post("/v1/chat/completions", json={**body, "max_tokens": 1000, "temperature": 0})
        assert refused.status_code == 503
        assert refused.json()["error"]["code"] == "EngineBusyError"
        # Those that were taken are gone: with two left, the next would be refused.
        answered = await here.post("/v1/chat/completions", json={**body, "n": 2, "max_tokens": 2})
        assert answered.status_code == 200
        async with asyncio.timeout(30):  # the last token is told before its row is free
            while not {"frontdesk_engine_active 0.0", "frontdesk_engine_waiting 0.0"} <= set(  # noqa: ASYNC110
                (await here.get("/metrics")).text.splitlines()
            ):
                await asyncio.sleep(0.01)


@pytest.mark.parametrize("streaming", [False, True])
def test_a_client_that_goes_away_frees_the_slots_of_all_choices(http: httpx.Client, client: OpenAI, streaming: bool) -> None:
    num_tokens = metric(http, "frontdesk_engine_generated_tokens")
    cancelled = {"domain": "healthcare", "finish_reason": "cancelled"}
    num_cancelled = metric(http, "frontdesk_turns_total", **cancelled)
    body = {"model": "healthcare", "messages": [{"role": "user", "content": "I am leaving"}], "n": 4, "temperature": 0}
    with httpx.Client(base_url=http.base_url, trust_env=False, timeout=1) as leaving:
        if streaming:
            with leaving.stream("POST", "/v1/chat/completions", json={**body, "max_tokens": 1500, "stream": True}) as response:
                lines = response.iter_lines()
                wait_until(lambda: '"content": ""' not in next(lines, "") and metric(http, "frontdesk_engine_active") == 4)
        else:
            with pytest.raises(httpx.ReadTimeout):
                leaving.post("/v1/chat/completions", json={**body, "max_tokens": 1500})
    wait_until(lambda: metric(http, "frontdesk_engine_active") == 0)
    wait_until(lambda: metric(http, "frontdesk_turns_total", **cancelled) == num_cancelled + 1)
    assert metric(http, "frontdesk_engine_generated_tokens") - num_tokens < 4 * 1500 / 2
    assert text_of(ask(client, "Hello"))


# JSON.


class Urgency(Enum):
    LOW = "low"
    HIGH = "high"


class Caller(BaseModel):
    name: str = Field(max_length=12)
    age: int = Field(ge=0, le=130)


class Ticket(BaseModel):
    urgency: Urgency
    caller: Caller
    is_open: bool
    labels: list[Urgency] = Field(max_length=2)


def small(schema: dict[str, Any]) -> dict[str, Any]:
    return {"type": "json_schema", "json_schema": {"name": "small", "schema": schema, "strict": True}}


YES_OR_NO = {
    "type": "object",
    "properties": {"answer": {"enum": ["yes", "no"]}, "sure": {"type": "boolean"}},
    "required": ["answer", "sure"],
    "additionalProperties": False,
}


def test_the_official_client_parses_its_own_model(client: OpenAI) -> None:
    for seed in range(4):
        completion = client.chat.completions.parse(
            model="banking",
            messages=[{"role": "user", "content": "My card is gone!"}],
            response_format=Ticket,
            temperature=1.5,
            seed=seed,
            max_tokens=400,
        )
        assert isinstance(completion.choices[0].message.parsed, Ticket)


def test_json_by_schema_in_every_choice_whole_and_streamed(client: OpenAI) -> None:
    more = {"response_format": small(YES_OR_NO), "n": 3, "seed": 3, "temperature": 1.5, "max_tokens": 200}
    answer = ask(client, "Hello", **more)
    assert [choice.finish_reason for choice in answer.choices] == ["stop"] * 3
    for text in texts_of(answer):
        jsonschema_rs.validate(YES_OR_NO, json.loads(text))
    parts = by_choice(stream(client, "Hello", **more))
    assert ["".join(part.delta.content or "" for part in parts[index]) for index in range(3)] == texts_of(answer)


def test_the_stream_helper_of_the_official_client_parses_too(client: OpenAI) -> None:
    with client.chat.completions.stream(
        model="banking",
        messages=[{"role": "user", "content": "Hello"}],
        response_format=Caller,
        temperature=1.5,
        seed=1,
        max_tokens=400,
        logprobs=True,
    ) as events:
        final = events.get_final_completion()
    assert isinstance(final.choices[0].message.parsed, Caller)
    assert said(final.choices[0].logprobs.content or []) == final.choices[0].message.content  # type: ignore[union-attr]


def test_a_length_may_cut_json_and_log_probabilities_do_not_see_the_schema(client: OpenAI) -> None:
    plain = tokens_of(ask(client, "Hello", max_tokens=1, logprobs=True, top_logprobs=5))[0]
    cut = ask(client, "Hello", max_tokens=1, logprobs=True, top_logprobs=5, response_format=small(YES_OR_NO))
    assert cut.choices[0].finish_reason == "length"
    (token,) = tokens_of(cut)
    assert token.token.lstrip()[:1] in ("{", "")
    assert [other.token for other in token.top_logprobs] == [other.token for other in plain.top_logprobs]


def test_any_object_and_plain_text(client: OpenAI) -> None:
    text = text_of(ask(client, "Hello", response_format={"type": "json_object"}, max_tokens=3))
    assert text.lstrip().startswith("{")
    plain = ask(client, "Hello", max_tokens=3)
    assert text_of(ask(client, "Hello", response_format={"type": "text"}, max_tokens=3)) == text_of(plain)


def test_a_clarifying_question_is_a_refusal_to_who_wants_json(client: OpenAI) -> None:
    more = {"model": "auto", "response_format": small(YES_OR_NO)}
    plain = text_of(ask(client, "What is the capital of Mongolia?", model="auto"))
    message = ask(client, "What is the capital of Mongolia?", **more).choices[0].message
    assert (message.content, message.refusal) == (None, plain)
    parts = by_choice(stream(client, "What is the capital of Mongolia?", **more))[0]
    assert "".join(part.delta.refusal or "" for part in parts) == plain
    assert "".join(part.delta.content or "" for part in parts) == ""


# Refusals.

HELLO = [{"role": "user", "content": "Hello"}]
SCHEMA = {"type": "json_schema", "json_schema": {"name": "s"}}
REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "no choice": ({"n": 0}, "n: .*greater than or equal to 1"),
    "too many choices": ({"n": 9}, "n: .*less than or equal to 8"),
    "too many alternatives": ({"logprobs": True, "top_logprobs": 21}, "top_logprobs: .*less than or equal to 20"),
    "alternatives alone": ({"top_logprobs": 2}, "top_logprobs is given without logprobs; set logprobs to true"),
    "no such format": ({"response_format": {"type": "xml"}}, "response_format: .*'text', 'json_object', 'json_schema'"),
    "no type": ({"response_format": {}}, "response_format: .*type"),
    "no schema": ({"response_format": SCHEMA}, "schema: Field required"),
    "a bad name": ({"response_format": {"type": "json_schema", "json_schema": {"name": "a b", "schema": {}}}}, "name"),
    "schema a text": ({"response_format": {"type": "json_schema", "json_schema": {"name": "s", "schema": "x"}}}, "schema"),
    "impossible": ({"response_format": small({"type": "objekt"})}, "schema cannot be served: Invalid type: objekt"),
    "not served": ({"response_format": small({"type": "array", "uniqueItems": True})}, "Unimplemented keys"),
    "large": ({"response_format": small({"description": "x" * 70_000})}, r"has 70\d+ bytes, at most 65536"),
    "unknown in schema": (
        {"response_format": {"type": "json_schema", "json_schema": {"name": "s", "schema": {}, "grammar": "x"}}},
        "grammar: Extra inputs",
    ),
    "no number": ({"response_format": small({"type": "integer", "minimum": math.nan})}, "schema cannot be served"),
    "tool choice": ({"tool_choice": "required"}, "tool_choice"),
    "audio": ({"modalities": ["text", "audio"]}, "modalities"),
    "effort": ({"reasoning_effort": "high"}, "reasoning_effort"),
    "search": ({"web_search_options": {}}, "web_search_options"),
    "penalty": ({"presence_penalty": 0.5}, "presence_penalty"),
    "bias": ({"logit_bias": {"5": 10}}, "logit_bias"),
    "long user": ({"user": "x" * 257}, "user: .*at most 256"),
    "long identifier": ({"safety_identifier": "x" * 257}, "safety_identifier: .*at most 256"),
    "zero": ({"messages": [{"role": "user", "content": "Hel\0lo"}]}, "character 3 is U\\+0000"),
    "zero in a stop": ({"stop": "\0"}, "character 0 is U\\+0000"),
    "zero in metadata": ({"metadata": {"conversation_id": "a\0"}}, "character 1 is U\\+0000"),
    "zero in a model": ({"model": "a\0"}, "character 1 is U\\+0000"),
    "half a model": ({"model": "\ud83d"}, "model: character 0 is half"),
}


@pytest.mark.parametrize("name", REFUSED)
@pytest.mark.parametrize("streaming", [False, True])
def test_what_is_not_served_is_refused_by_name(http: httpx.Client, name: str, streaming: bool) -> None:
    change, pattern = REFUSED[name]
    body = json.dumps({"model": "banking", "messages": HELLO, "stream": streaming, "max_tokens": 2, **change})
    check_refusal(http.post("/v1/chat/completions", content=body, headers={"Content-Type": "application/json"}), 400, pattern)


def test_what_asks_for_nothing_is_taken(client: OpenAI) -> None:
    asked_for_nothing = {
        "user": "anna",
        "safety_identifier": "x" * 256,
        "tools": [],
        "tool_choice": "none",
        "presence_penalty": 0,
        "frequency_penalty": 0.0,
        "logit_bias": {},
        "modalities": ["text"],
        "n": 1,
        "logprobs": False,
    }
    assert text_of(ask(client, "Hello", extra_body=asked_for_nothing)) == text_of(ask(client, "Hello"))


def test_the_official_client_raises_the_librarys_reason(client: OpenAI) -> None:
    with pytest.raises(openai.BadRequestError, match="Invalid type: objekt"):
        ask(client, "Hello", response_format=small({"type": "objekt"}))


# What OpenAPI says.


def document(http: httpx.Client) -> dict[str, Any]:
    found: dict[str, Any] = http.get("/openapi.json").json()
    return found


@pytest.mark.parametrize(
    "more",
    [
        {},
        {"n": 2, "logprobs": True, "top_logprobs": 2},
        {"response_format": small(YES_OR_NO)},
        {"model": "auto", "messages": [{"role": "user", "content": "What is the capital of Mongolia?"}]},
    ],
)
def test_answers_are_what_openapi_says(http: httpx.Client, more: dict[str, Any]) -> None:
    described = document(http)
    content = described["paths"]["/v1/chat/completions"]["post"]["responses"]["200"]["content"]
    whole = {**content["application/json"]["schema"], "components": described["components"]}
    done, data = content["text/event-stream"]["itemSchema"]["properties"]["data"]["anyOf"]
    chunk, error = data["contentSchema"]["anyOf"]
    body = {"model": "banking", "messages": HELLO, "max_tokens": 4, **more}
    answer = http.post("/v1/chat/completions", json=body).json()
    jsonschema_rs.validate(whole, answer)
    del answer["frontdesk"]
    assert not jsonschema_rs.is_valid(whole, answer)  # or it says nothing
    body = {**body, "stream": True, "stream_options": {"include_usage": True}}
    events = [line.removeprefix("data: ") for line in http.post("/v1/chat/completions", json=body).text.splitlines() if line]
    assert events.pop() == done["const"] == "[DONE]"
    for event in events:
        jsonschema_rs.validate(chunk, json.loads(event))
    jsonschema_rs.validate(error, http.post("/v1/chat/completions", json={}).json())
    assert not re.search(r'"\$ref"', json.dumps(content["text/event-stream"]))
