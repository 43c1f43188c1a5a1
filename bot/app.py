"""The composition root: one context manager owns every resource of a running service."""

import asyncio
import logging
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass

from bot.answering import Answerer
from bot.chat import Chat
from bot.conversations.log import ConversationLog, open_log
from bot.engine.torch_engine import TorchEngine
from bot.routing.encoder import Encoder
from bot.routing.live import LiveRouter
from bot.settings import Settings
from bot.shadow import Shadows
from bot.telemetry import Telemetry
from prompt_bank.bank import Bank
from prompt_bank.errors import ServiceError
from prompt_bank.model_files import MINILM, Report, find_model
from prompt_bank.opening import LoadedModel, load_model, open_bank
from prompt_bank.starter import install_starters

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Service:
    """Everything a channel needs."""

    chat: Chat
    bank: Bank
    engine: TorchEngine
    conversations: ConversationLog
    telemetry: Telemetry


@asynccontextmanager
async def open_service(settings: Settings, report: Report = lambda _: None) -> AsyncIterator[Service]:
    """A service with its models loaded and its starter domains live. On leaving, it drains and closes in reverse order."""
    loaded, encoder = await asyncio.to_thread(_load_models, settings, report)
    base, model = loaded.base, loaded.served
    engine = TorchEngine(
        base,
        num_rows=settings.max_batch,
        max_waiting=settings.max_waiting,
        context_tokens=settings.context_tokens,
        prefix_budget_bytes=settings.prefix_cache_mb * 1024 * 1024,
        drain_s=settings.drain_s,
    )
    async with open_bank(settings) as bank, open_log(settings.data_dir / "conversations.db") as conversations, engine:
        await install_starters(bank, model)
        telemetry, router = Telemetry(engine.stats, bank.read_stats), LiveRouter(bank, encoder)
        live = (await bank.claim_table()).live_versions(model.fingerprint)
        await router.fitted(live)  # now, so that the first person does not wait for it
        answerer = Answerer(bank, engine, model, loaded.chat_format, base.stop_token_ids)
        chat = Chat(
            bank,
            answerer,
            router,
            conversations,
            telemetry,
            Shadows(answerer, conversations, telemetry, engine.is_half_idle, settings.drain_s),
            model,
            default_domain=settings.default_domain,
            max_message_chars=settings.max_message_chars,
            max_turns=settings.max_batch + settings.max_waiting,
        )
        domains = list(await chat.cards())
        _check_default_domain(settings, domains)
        report(f"{base.name} on {base.device} in {str(base.dtype).removeprefix('torch.')}, domains: {', '.join(domains)}")
        try:
            yield Service(chat, bank, engine, conversations, telemetry)
        finally:
            await chat.close()


def _check_default_domain(settings: Settings, domains: list[str]) -> None:
    if settings.default_domain not in (None, *domains):
        raise ServiceError(
            f"setting FRONTDESK_DEFAULT_DOMAIN={settings.default_domain!r}: no such domain is live; "
            f"there are: {', '.join(domains)}"
        )


def _load_models(settings: Settings, report: Report) -> tuple[LoadedModel, Encoder]:
    return load_model(settings, report), Encoder(find_model(MINILM.name, settings.models_dir, report))
