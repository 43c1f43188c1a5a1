"""Shadow answers: after a turn was answered, the domain's shadow version answers it too, for the log alone.

A shadow starts once the person has their answer, and only while the engine has room: what finds none is left out and counted.
While it runs it shares the batch with people's answers, and they share its cost.
"""

import asyncio
import logging
from collections.abc import Callable, Sequence

from bot.answering import Answer, Answerer, Overrides
from bot.conversations.log import ConversationLog
from bot.conversations.records import ShadowAnswer
from bot.telemetry import Telemetry
from prompt_bank.conversation import Message
from prompt_bank.errors import FrontdeskError
from prompt_bank.version import Version

log = logging.getLogger(__name__)


class Shadows:
    """Used from one event loop; owns its tasks until `close`."""

    def __init__(
        self,
        answerer: Answerer,
        conversations: ConversationLog,
        telemetry: Telemetry,
        has_room: Callable[[], bool],
        drain_s: float = 10.0,
    ) -> None:
        self._answerer = answerer
        self._log = conversations
        self._telemetry = telemetry
        self._has_room = has_room
        self._drain_s = drain_s
        self._running: dict[asyncio.Task[None], Version] = {}

    def start(self, turn_id: str, version: Version, messages: Sequence[Message], overrides: Overrides) -> None:
        """Answers a logged turn with `version`, in the background."""
        if not self._has_room():
            self._telemetry.record_shadow(version, "skipped")
            return
        task = asyncio.create_task(self._answer(turn_id, version, messages, overrides))
        self._running[task] = version
        task.add_done_callback(self._running.pop)

    async def close(self) -> None:
        """Waits for what still runs, as a service that answers one question and ends would never have a shadow's answer.

        What is left when the time is up is cancelled and counted.
        """
        running = dict(self._running)
        if not running:
            return
        _, left = await asyncio.wait(running, timeout=self._drain_s)
        for task in left:
            task.cancel()
            self._telemetry.record_shadow(running[task], "cancelled")
        await asyncio.gather(*left, return_exceptions=True)

    async def _answer(self, turn_id: str, version: Version, messages: Sequence[Message], overrides: Overrides) -> None:
        answer = Answer()
        try:
            async for _ in self._answerer.generate(version, messages, overrides, [answer]):
                pass
            shadow = ShadowAnswer(
                turn_id=turn_id,
                version=version.manifest.version,
                digest=version.digest,
                answer=answer.text,
                token_ids=tuple(answer.token_ids),
                finish_reason=answer.finish_reason or "error",
                total_ms=answer.elapsed_ms(),
            )
            await self._log.add_shadow(shadow)
        except FrontdeskError as error:
            log.warning("no shadow answer of %s to turn %s: %s", version.name, turn_id, error)
            self._telemetry.record_shadow(version, "failed")
            return
        self._telemetry.record_shadow(version, "answered")
