"""A client of the HTTP API for the terminal: the same service that everybody else uses, or one of its own when none runs."""

import json
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from typing import Any

import httpx

from bot.settings import Settings
from prompt_bank.card import ROUTED
from prompt_bank.conversation import Message
from prompt_bank.errors import ServiceError
from prompt_bank.model_files import Report

# An answer may take long; a service that is there accepts a connection at once.
_TIMEOUT = httpx.Timeout(300, connect=2)


class Client:
    """Errors of the service and of the connection become ServiceError, with the service's own sentence where it gave one."""

    def __init__(self, http: httpx.AsyncClient) -> None:
        self._http = http

    async def domains(self) -> list[str]:
        answer = await self._request("GET", "/v1/models")
        return [model["id"] for model in answer["data"] if model["id"] != ROUTED]

    async def complete(self, messages: Sequence[Message], domain: str | None) -> dict[str, Any]:
        return await self._request("POST", "/v1/chat/completions", _body(messages, domain, None))

    async def vote(self, turn_id: str, vote: str) -> None:
        await self._request("POST", "/v1/feedback", {"turn_id": turn_id, "vote": vote})

    async def stream(
        self, messages: Sequence[Message], domain: str | None, conversation_id: str | None
    ) -> AsyncIterator[dict[str, Any]]:
        """The chunks of an answer."""
        body = {**_body(messages, domain, conversation_id), "stream": True}
        try:
            async with self._http.stream("POST", "/v1/chat/completions", json=body) as response:
                if response.is_error:
                    raise _service_error(await response.aread())
                async for line in response.aiter_lines():
                    data = line.removeprefix("data: ")
                    if not data or data == "[DONE]":
                        continue
                    chunk = json.loads(data)
                    if "error" in chunk:
                        raise ServiceError(chunk["error"]["message"])
                    yield chunk
        except httpx.HTTPError as error:
            raise ServiceError(f"the connection to the service broke: {error or type(error).__name__}") from error

    async def _request(self, method: str, path: str, body: dict[str, Any] | None = None) -> dict[str, Any]:
        try:
            response = await self._http.request(method, path, json=body)
        except httpx.HTTPError as error:
            raise ServiceError(f"the connection to the service broke: {error or type(error).__name__}") from error
        if response.is_error:
            raise _service_error(response.content)
        answer: dict[str, Any] = response.json()
        return answer


def _body(messages: Sequence[Message], domain: str | None, conversation_id: str | None) -> dict[str, Any]:
    metadata = {"metadata": {"conversation_id": conversation_id}} if conversation_id else {}
    return {"model": domain or ROUTED, "messages": [message.model_dump() for message in messages], **metadata}


def _service_error(content: bytes) -> ServiceError:
    try:
        return ServiceError(json.loads(content)["error"]["message"])
    except (ValueError, KeyError, TypeError):
        return ServiceError(f"no Frontdesk answers there: {content[:100]!r}; check the URL")


@asynccontextmanager
async def connect(settings: Settings, url: str | None, report: Report) -> AsyncIterator[Client]:
    """A client of the service at `url`; without one, of the service at the settings' address, or else of one of its own."""
    own_url = f"http://{settings.host}:{settings.port}"
    url = url and url.rstrip("/").removesuffix("/v1")
    if url is None and not await _answers(own_url):
        from bot.channels.http.server import serving  # brings torch, which a client alone does not need

        report("no service is running here: starting one for this command (`make run` keeps one running)")
        async with serving(settings, report) as started, _client(started, settings) as client:
            yield client
        return
    if url is not None and not await _answers(url):
        raise ServiceError(f"no service answers at {url}; check the address or start one with `frontdesk serve`")
    async with _client(url or own_url, settings) as client:
        yield client


@asynccontextmanager
async def _client(url: str, settings: Settings) -> AsyncIterator[Client]:
    key = settings.api_key
    headers = {"Authorization": f"Bearer {key.get_secret_value()}"} if key else {}
    async with httpx.AsyncClient(base_url=url, headers=headers, timeout=_TIMEOUT, trust_env=False) as http:
        yield Client(http)


async def _answers(url: str) -> bool:
    try:
        async with httpx.AsyncClient(timeout=_TIMEOUT, trust_env=False) as http:
            return (await http.get(f"{url}/livez")).is_success
    except (httpx.HTTPError, httpx.InvalidURL):
        return False
