"""JSON by schema through the real engine, on a random model at a high temperature: whatever it draws, an answer is valid."""

import asyncio
import json
import time
from collections.abc import AsyncIterator, Sequence
from typing import Any

import jsonschema_rs
import pytest
import torch

from bot.engine.request import GeneratedToken, GenerationRequest, SamplingParams
from bot.engine.torch_engine import TorchEngine
from bot.structured_output import ANY_OBJECT, MAX_SCHEMA_BYTES, StructuredOutput
from prompt_bank.base_model import BaseModel
from prompt_bank.chat_format import ChatFormat
from prompt_bank.errors import BadRequestError, EngineFailedError
from tests.bot.engine.tools import request, text

SEEDS = range(12)

TRANSFER = {
    "type": "object",
    "properties": {
        "amount": {"type": "integer", "minimum": -5, "maximum": 500},
        "currency": {"enum": ["EUR", 'US"D', "Złoty 🙂", None]},
        "urgent": {"type": "boolean"},
        "payee": {
            "type": "object",
            "properties": {
                "name": {"type": "string", "maxLength": 12},
                "iban": {"type": "string", "pattern": "^[A-Z]{2}[0-9]{4}$"},
            },
            "required": ["name", "iban"],
            "additionalProperties": False,
        },
        "tags": {"type": "array", "items": {"$ref": "#/$defs/tag"}, "minItems": 1, "maxItems": 3},
    },
    "required": ["amount", "currency", "urgent", "payee", "tags"],
    "additionalProperties": False,
    "$defs": {"tag": {"anyOf": [{"const": "a\\b"}, {"type": "number", "minimum": 0, "maximum": 1}]}},
}


@pytest.fixture
async def engine(tiny: BaseModel) -> AsyncIterator[TorchEngine]:
    async with TorchEngine(tiny, num_rows=8, max_waiting=16, context_tokens=256) as running:
        yield running


@pytest.fixture(scope="module")
def structured(tiny: BaseModel) -> StructuredOutput:
    return StructuredOutput(tiny.tokenizer, tiny.stop_token_ids)


def asked(tiny: BaseModel, seed: int, processors: Sequence[Any] = (), max_tokens: int = 200) -> GenerationRequest:
    sampling = SamplingParams(temperature=1.5, seed=seed)
    return GenerationRequest(
        text(5, seed), max_tokens, sampling=sampling, stop_token_ids=tiny.stop_token_ids, logits_processors=processors
    )


async def answers(
    engine: TorchEngine, tiny: BaseModel, structured: StructuredOutput, schema: Any, seeds: Sequence[int] = SEEDS
) -> list[tuple[str, str | None]]:
    """Text and finish reason for each seed, all in one batch."""
    grammar = structured.grammar(json.dumps(schema))
    requests = [asked(tiny, seed, [grammar.processor()]) for seed in seeds]
    given = await asyncio.gather(*(tokens_of(engine, one) for one in requests))
    decode = ChatFormat(tiny.tokenizer).decode
    return [(decode([token.token_id for token in tokens]), tokens[-1].finish_reason) for tokens in given]


async def tokens_of(engine: TorchEngine, one: GenerationRequest) -> list[GeneratedToken]:
    return [token async for token in engine.generate(one)]


async def test_an_answer_that_ends_is_valid_against_its_schema(
    engine: TorchEngine, tiny: BaseModel, structured: StructuredOutput
) -> None:
    given = await answers(engine, tiny, structured, TRANSFER)
    for answer, finish_reason in given:
        if finish_reason == "stop":
            jsonschema_rs.validate(TRANSFER, json.loads(answer))
    assert sum(finish_reason == "stop" for _, finish_reason in given) >= len(SEEDS) / 2  # or nothing is tested
    assert len({answer for answer, _ in given}) == len(SEEDS)


async def test_without_the_schema_no_seed_gives_json(engine: TorchEngine, tiny: BaseModel) -> None:
    decode = ChatFormat(tiny.tokenizer).decode
    for tokens in await asyncio.gather(*(tokens_of(engine, asked(tiny, seed, max_tokens=40)) for seed in SEEDS)):
        with pytest.raises(json.JSONDecodeError):
            json.loads(decode([token.token_id for token in tokens]))


@pytest.mark.parametrize(
    "schema",
    [
        {"enum": ["one", "zwei 🙂", 'th"ree', "\\", "\u2028"]},
        {"type": "array", "items": {"type": "boolean"}, "minItems": 2, "maxItems": 4},
        {"type": "string", "maxLength": 30},
        {"type": ["integer", "null"]},
        {"anyOf": [{"type": "object", "properties": {"a": {"const": 1}}, "required": ["a"], "additionalProperties": False}]},
    ],
)
async def test_every_kind_of_value(
    engine: TorchEngine, tiny: BaseModel, structured: StructuredOutput, schema: dict[str, Any]
) -> None:
    given = await answers(engine, tiny, structured, schema, range(6))
    ended = [answer for answer, finish_reason in given if finish_reason == "stop"]
    assert len(ended) >= 3
    for answer in ended:
        jsonschema_rs.validate(schema, json.loads(answer))


async def test_any_object_at_all(engine: TorchEngine, tiny: BaseModel, structured: StructuredOutput) -> None:
    given = await answers(engine, tiny, structured, json.loads(ANY_OBJECT), range(8))
    ended = [json.loads(answer) for answer, finish_reason in given if finish_reason == "stop"]
    assert ended  # the others wrote on until their length was reached
    assert all(isinstance(value, dict) for value in ended)
    assert all(answer.lstrip()[0] == "{" for answer, _ in given)


async def test_who_shares_a_batch_with_json_gives_the_same_text_as_alone(
    engine: TorchEngine, tiny: BaseModel, structured: StructuredOutput
) -> None:
    plain = asked(tiny, 7, max_tokens=40)
    alone = await tokens_of(engine, plain)
    grammar = structured.grammar(json.dumps(TRANSFER))
    constrained = [asked(tiny, seed, [grammar.processor()]) for seed in range(3)]
    beside, *_ = await asyncio.gather(*(tokens_of(engine, one) for one in [plain, *constrained]))
    assert beside == alone


def test_once_the_json_is_whole_only_a_stop_token_may_come(tiny: BaseModel, structured: StructuredOutput) -> None:
    grammar, prompt_ids = structured.grammar('{"const": 7}'), [50, 60]
    process, logits = grammar.processor(), torch.zeros(len(tiny.tokenizer) + 5)
    seven = tiny.tokenizer("7", add_special_tokens=False)["input_ids"]
    allowed = [index for index, value in enumerate(process(prompt_ids, logits).tolist()) if value == 0]
    assert allowed == seven
    allowed = [index for index, value in enumerate(process([*prompt_ids, *seven], logits).tolist()) if value == 0]
    assert frozenset(allowed) == tiny.stop_token_ids
    assert torch.equal(logits, torch.zeros_like(logits))  # its argument is left alone
    assert torch.isfinite(grammar.processor()(prompt_ids, logits)).sum() == 1  # another generation starts anew


REFUSED: dict[str, tuple[Any, str]] = {
    "no such type": ({"type": "objekt"}, "Invalid type: objekt"),
    "dangling": ({"$ref": "#/nope"}, "'/nope' does not exist"),
    "from elsewhere": ({"$ref": "http://example.org/s"}, "does not fetch resources"),
    "not served": ({"type": "array", "uniqueItems": True}, r'Unimplemented keys: \["uniqueItems"\]'),
    "nested": ({"type": "object", "properties": {"a": {"not": {}}}}, 'Unimplemented keys: \\["not"\\]'),
    "lenient by itself": ({"type": "array", "uniqueItems": True, "x-guidance": {"lenient": True}}, "uniqueItems"),
    "bad pattern": ({"type": "string", "pattern": "(a"}, "unclosed group"),
    "nothing is valid": ({"type": "integer", "minimum": 5, "maximum": 2}, "Unsatisfiable"),
    "a text": ("object", "response_format: the schema cannot be served"),
    "itself": ({"$ref": "#"}, "response_format: the schema cannot be served"),
    "wide": ({"type": "object", "properties": {f"p{n}": {"type": "integer"} for n in range(2000)}}, "items"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_a_schema_that_cannot_be_served_is_refused_with_the_reason(structured: StructuredOutput, name: str) -> None:
    schema, reason = REFUSED[name]
    with pytest.raises(BadRequestError, match=reason) as refused:
        structured.grammar(json.dumps(schema))
    assert "\n" not in str(refused.value)
    assert len(str(refused.value)) < 500


def test_a_large_schema_is_refused_with_the_numbers(structured: StructuredOutput) -> None:
    with pytest.raises(BadRequestError, match=f"has 7.... bytes, at most {MAX_SCHEMA_BYTES}"):
        structured.grammar(json.dumps({"description": "x" * 70_000}))


def test_a_schema_nested_deeper_than_any_is_refused(structured: StructuredOutput) -> None:
    with pytest.raises(BadRequestError, match="recursion limit"):
        structured.grammar('{"items":' * 5000 + "{}" + "}" * 5000)


async def test_a_grammar_that_grows_too_slow_fails_only_its_own_request(
    engine: TorchEngine, tiny: BaseModel, structured: StructuredOutput
) -> None:
    """A pattern whose automaton doubles with every character."""
    pattern = {"type": "string", "pattern": "^((.*a.{500})|(.*b.{300}c))$"}
    grammar = structured.grammar(json.dumps(pattern))
    good = asyncio.ensure_future(tokens_of(engine, request(text(5, 1), max_tokens=60)))
    started = time.monotonic()
    with pytest.raises(EngineFailedError, match="ValueError: "):
        await tokens_of(engine, asked(tiny, 1, [grammar.processor()]))
    assert time.monotonic() - started < 5
    assert len(await good) == 60
