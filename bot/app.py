"""The composition root: one context manager owns every resource of a running service."""

import asyncio
import logging
from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

from bot.access.entrance import Entrance
from bot.access.keys import ApiKeys
from bot.access.limits import Limiter, open_limiter
from bot.answering import Answerer
from bot.chat import Chat
from bot.conversations import audit
from bot.conversations.database import Database, open_database
from bot.conversations.events import Events
from bot.conversations.idempotency import IdempotentRequests
from bot.conversations.inbox import Inbox
from bot.conversations.log import ConversationLog
from bot.conversations.reading import LogReader
from bot.engine.request import Engine
from bot.engine.torch_engine import TorchEngine
from bot.following import Follower
from bot.routing.encoder import Encoder
from bot.routing.live import LiveRouter
from bot.settings import Settings
from bot.shadow import Shadows
from bot.telemetry import Telemetry
from bot.worker import Worker
from prompt_bank.bank import Bank
from prompt_bank.cache import RedisCache
from prompt_bank.errors import ServiceError
from prompt_bank.model_files import MINILM, Report, find_model
from prompt_bank.opening import LoadedModel, load_model, open_bank, open_redis
from prompt_bank.starter import install_starters
from prompt_bank.version import ServedModel

log = logging.getLogger(__name__)


# Makes what decodes: the embedded engine, or another behind the same seam.
EngineFactory = Callable[[LoadedModel, Settings], AbstractAsyncContextManager[Engine]]


def torch_engine(loaded: LoadedModel, settings: Settings) -> TorchEngine:
    return TorchEngine(
        loaded.base,
        num_rows=settings.max_batch,
        max_waiting=settings.max_waiting,
        context_tokens=settings.context_tokens,
        prefix_budget_bytes=settings.prefix_cache_mb * 1024 * 1024,
        drain_s=settings.drain_s,
    )


@dataclass(frozen=True, slots=True)
class Service:
    """Everything a channel needs."""

    chat: Chat
    bank: Bank
    engine: Engine
    database: Database
    conversations: ConversationLog
    reader: LogReader
    idempotency: IdempotentRequests
    inbox: Inbox
    events: Events
    worker: Worker
    follower: Follower
    telemetry: Telemetry
    entrance: Entrance
    limiter: Limiter | None
    model: ServedModel

    async def recorded(self, actor: str, action: str, object_: str, detail: dict[str, Any]) -> None:
        """Tells the audit what was done. Raises LogUnavailableError."""
        async with self.database.writing() as connection:
            await audit.record(connection, actor, action, object_, detail)


@asynccontextmanager
async def open_service(
    settings: Settings, report: Report = lambda _: None, make_engine: EngineFactory = torch_engine
) -> AsyncIterator[Service]:
    """A service with its models loaded and its starter domains live. On leaving, it drains and closes in reverse order."""
    loaded, encoder = await asyncio.to_thread(_load_models, settings, report)
    base, model = loaded.base, loaded.served
    async with (
        open_redis(settings) as redis_url,
        open_bank(settings, redis_url) as bank,
        open_database(settings.log_url) as database,
        # Without keys there is nobody to tell apart.
        open_limiter(settings, redis_url, bank.id) if settings.requires_keys else nullcontext() as limiter,
        make_engine(loaded, settings) as engine,
    ):
        await install_starters(bank, model)
        conversations, reader = ConversationLog(database), LogReader(database)
        inbox = _inbox(bank.cache, settings)
        events = Events(bank.cache.redis, bank.cache.prefix)
        idempotency = IdempotentRequests(database)
        telemetry, router = Telemetry(engine.stats, bank.read_stats), LiveRouter(bank, encoder)
        live = (await bank.claim_table()).live_versions(model.fingerprint)
        await router.fitted(live)  # now, so that the first person does not wait for it
        answerer = Answerer(bank, engine, model, loaded.chat_format, base.stop_token_ids)
        chat = Chat(
            bank,
            answerer,
            router,
            conversations,
            inbox,
            telemetry,
            Shadows(answerer, conversations, telemetry, engine.is_half_idle, settings.drain_s),
            model,
            default_domain=settings.default_domain,
            max_message_chars=settings.max_message_chars,
            max_turns=settings.max_batch + settings.max_waiting,
        )
        domains = list(await chat.cards())
        _check_default_domain(settings, domains)
        entrance = await _entrance(settings, database, report)
        report(f"{base.name} on {base.device} in {str(base.dtype).removeprefix('torch.')}, domains: {', '.join(domains)}")
        worker = Worker(
            bank,
            chat,
            inbox,
            events,
            conversations,
            reader,
            num_slots=settings.max_batch,
            can_answer=lambda: engine.is_running,
        )
        try:
            async with events.listening(), worker.running(settings.drain_s):
                yield Service(
                    chat=chat,
                    bank=bank,
                    engine=engine,
                    database=database,
                    conversations=conversations,
                    reader=reader,
                    idempotency=idempotency,
                    inbox=inbox,
                    events=events,
                    worker=worker,
                    follower=Follower(events, inbox, reader, worker),
                    telemetry=telemetry,
                    entrance=entrance,
                    limiter=limiter,
                    model=model,
                )
        finally:
            await chat.close()
            await inbox.close()
            await idempotency.close()


def _inbox(cache: RedisCache, settings: Settings) -> Inbox:
    return Inbox(
        cache.redis,
        cache.prefix,
        cache.table_key,
        lease_s=settings.lease_s,
        max_messages=settings.inbox_messages,
        max_conversation_messages=settings.inbox_conversation_messages,
    )


async def _entrance(settings: Settings, database: Database, report: Report) -> Entrance:
    if not settings.requires_keys:
        if not settings.is_local:
            log.warning("listening on %s without API keys: whoever reaches it may do everything", settings.host)
        return Entrance(None)
    keys = ApiKeys(database)
    if not await keys.has_live():
        report("API keys are required and there is none yet; make one with: frontdesk keys add NAME --role admin")
    return Entrance(keys)


def _check_default_domain(settings: Settings, domains: list[str]) -> None:
    if settings.default_domain not in (None, *domains):
        raise ServiceError(
            f"setting FRONTDESK_DEFAULT_DOMAIN={settings.default_domain!r}: no such domain is live; "
            f"there are: {', '.join(domains)}"
        )


def _load_models(settings: Settings, report: Report) -> tuple[LoadedModel, Encoder]:
    return load_model(settings, report), Encoder(find_model(MINILM.name, settings.models_dir, report))
