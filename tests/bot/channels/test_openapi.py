"""The OpenAPI page is true: schemathesis finds nothing, and every refusal has one shape and names its place."""

import asyncio
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from bot.access.keys import ApiKeys, NewKey
from bot.conversations.database import open_database, sqlite_url
from tests.bot.channels.held import bearer
from tests.bot.service import RunningService, running_service

EVENTS = "/v1/conversations/{conversation_id}/events"


@pytest.fixture(scope="module")
def service(
    tiny_model_dir: Path, models_dir: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[tuple[RunningService, str]]:
    """With API keys required, and an admin's. Its context is short, so that no answer takes long."""
    data_dir = tmp_path_factory.mktemp("openapi")

    async def add_key() -> str:
        async with open_database(sqlite_url(data_dir / "conversations.db")) as database:
            key = NewKey("admin", "admin", rate_per_minute=10**6, max_concurrent=100)
            return await ApiKeys(database).add(key, "test")

    secret = asyncio.run(add_key())
    settings = {
        "FRONTDESK_BASE_MODEL": str(tiny_model_dir),
        "FRONTDESK_DTYPE": "float32",
        "FRONTDESK_API_KEYS": "required",
        "FRONTDESK_PERSON_RATE_PER_MINUTE": "1000000",
        "FRONTDESK_CONTEXT_TOKENS": "300",
    }
    with running_service(models_dir, data_dir, **settings) as running:
        yield running, secret


# What a schema cannot say is no fault: that roles alternate, a key came before, an answer is under way. Streams that end are
# read whole; the one stream that does not end by itself is left out.
CONFIG = """
seed = 1
max-failures = 20
continue-on-failure = true
request-timeout = 60
headers = {{ Authorization = "Bearer {secret}" }}

[generation]
max-examples = 8
database = "none"

[checks.positive_data_acceptance]
expected-statuses = ["2xx", "3xx", 400, 401, 403, 404, 409, 422, 429]

[checks.not_a_server_error]
expected-statuses = ["2xx", "3xx", "4xx"]

[[operations]]
include-path = "{events}"
enabled = false
"""


def test_schemathesis_finds_nothing(service: tuple[RunningService, str], tmp_path: Path) -> None:
    running, secret = service
    config = tmp_path / "schemathesis.toml"
    config.write_text(CONFIG.format(secret=secret, events=EVENTS))
    command = [sys.executable, "-m", "schemathesis.cli", "--config-file", str(config), "run", f"{running.url}/openapi.json"]
    ran = subprocess.run([*command, "--no-color"], cwd=tmp_path, capture_output=True, text=True, timeout=900, check=False)
    assert ran.returncode == 0, ran.stdout[-8000:] + ran.stderr[-2000:]
    assert "No issues found" in ran.stdout or " passed" in ran.stdout
    page = httpx.get(f"{running.url}/openapi.json", trust_env=False).json()
    num_operations = sum(len(operations) for operations in page["paths"].values())
    assert f"{num_operations - 1} selected / {num_operations} total" in ran.stdout  # all but one
    assert "Traceback" not in running.log_file.read_text()


# Errors.

BODIES = [
    b"",
    b"{",
    b"[]",
    b"null",
    b'"text"',
    b"\xff",
    b'{"unknown": 1}',
    b'{"text": 5, "turn_id": [], "messages": {}}',
    b"{}",
]


def test_every_route_refuses_bad_bodies_in_one_shape(service: tuple[RunningService, str]) -> None:
    running, secret = service
    with running.http as http:
        page = http.get("/openapi.json").json()
        for path, operations in page["paths"].items():
            filled = path.format(conversation_id="unknown", domain="banking", version=1, model="banking")
            for method, operation in operations.items():
                if "requestBody" not in operation:
                    continue
                for content in BODIES:
                    headers = bearer(secret) | {"Content-Type": "application/json"}
                    response = http.request(method, filled, content=content, headers=headers)
                    where = (method, path, content, response.text)
                    if not operation["requestBody"].get("required") and content in (b"", b"null", b"{}"):
                        continue
                    if response.status_code == 201 and content == b"{}":
                        continue
                    assert response.status_code in (400, 404), where
                    check_shape(response)
                    assert str(response.status_code) in operation["responses"], where


def test_what_is_no_route_is_refused_in_the_same_shape(service: tuple[RunningService, str]) -> None:
    running, secret = service
    with running.http as http:
        for method, path, status in (
            ("GET", "/nowhere", 404),
            ("DELETE", "/v1/conversations", 405),
            ("POST", "/v1/turns", 405),
            ("GET", "/v1/conversations/%2e%2e", 404),
            ("GET", "/v1/turns?limit=0", 400),
            ("GET", "/v1/turns?since=yesterday", 400),
        ):
            response = http.request(method, path, headers=bearer(secret))
            assert response.status_code == status, path
            check_shape(response)
        for path, methods in page_methods(http).items():
            if "{" not in path:
                assert allowed(http.request("TRACE", path)) == methods, path


def page_methods(http: httpx.Client) -> dict[str, set[str]]:
    paths = http.get("/openapi.json").json()["paths"]
    return {path: {method.upper() for method in operations} for path, operations in paths.items()}


def allowed(response: httpx.Response) -> set[str]:
    assert response.status_code == 405
    return set(response.headers["Allow"].split(", "))


def check_shape(response: httpx.Response) -> None:
    """OpenAI's, with nothing of our own types in it."""
    assert set(response.json()) == {"error"}
    error = response.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert error["type"] == "invalid_request_error"
    assert error["message"]
    for given in (error["message"], error["param"] or ""):
        assert not any(word in given for word in ("function-", "list[", "nullable", "pydantic", "object at 0x", "Traceback")), (
            given
        )


MESSAGES: list[Any] = [{"role": "user", "content": "Hi"}]


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({"messages": MESSAGES, "stop": [1]}, "stop.0"),
        ({"messages": MESSAGES, "stop": 1}, "stop"),
        ({"messages": MESSAGES, "stop": ["a", ""]}, "stop.1"),
        ({"messages": [{"role": "user", "content": 5}]}, "messages.0.content"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "messages.0.content.0.type"),
        ({"messages": [{"role": "user", "content": [{"type": "text"}]}]}, "messages.0.content.0.text"),
        ({"messages": [{"role": "robot", "content": "Hi"}]}, "messages.0.role"),
        ({"messages": [{"role": "user", "content": "a\0"}]}, "messages.0.content"),
        ({"messages": []}, "messages"),
        ({}, "messages"),
        ({"messages": MESSAGES, "response_format": {"type": "xml"}}, "response_format"),
        ({"messages": MESSAGES, "response_format": {"type": "json_schema"}}, "response_format.json_schema"),
        (
            {"messages": MESSAGES, "response_format": {"type": "json_schema", "json_schema": {"name": "$", "schema": {}}}},
            "response_format.json_schema.name",
        ),
        ({"messages": MESSAGES, "temperature": "0.5"}, "temperature"),
        ({"messages": MESSAGES, "max_tokens": True}, "max_tokens"),
        ({"messages": MESSAGES, "frequency_penalty": False}, "frequency_penalty"),
        ({"messages": MESSAGES, "stream": "no"}, "stream"),
        ({"messages": MESSAGES, "seed": 2**63}, "seed"),
        ({"messages": MESSAGES, "metadata": {"conversation_id": 5}}, "metadata.conversation_id"),
    ],
)
def test_an_error_names_the_place_in_what_was_sent(
    service: tuple[RunningService, str], body: dict[str, Any], param: str
) -> None:
    running, secret = service
    with running.http as http:
        refused = http.post("/v1/chat/completions", content=json.dumps(body), headers={**bearer(secret), **_JSON})
    assert refused.status_code == 400
    check_shape(refused)
    error = refused.json()["error"]
    assert error["param"] == param
    assert error["message"].startswith(f"{param}: ")


_JSON = {"Content-Type": "application/json"}


def test_numbers_are_taken_as_json_has_them(service: tuple[RunningService, str]) -> None:
    """Strict is not pedantic: 1 is a temperature, and 0 and 0.0 are no penalty."""
    running, secret = service
    body = {"model": "banking", "messages": MESSAGES, "max_tokens": 1, "temperature": 1, "frequency_penalty": 0}
    with running.http as http:
        for more in ({}, {"presence_penalty": 0.0}, {"seed": 9 * 10**18, "n": 2}, {"seed": -9 * 10**18}):
            assert http.post("/v1/chat/completions", json={**body, **more}, headers=bearer(secret)).status_code == 200
