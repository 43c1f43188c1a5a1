"""Response URLs: with one an app answers an interaction five times within half an hour, without a token."""

import secrets
from dataclasses import dataclass, field

from bot.channels.slack.sandbox.blocks import MOST_IN_MESSAGE, faults_of_blocks
from bot.channels.slack.sandbox.errors import MethodError
from bot.channels.slack.sandbox.messages import Message
from bot.channels.slack.sandbox.posting import Posting
from bot.channels.slack.sandbox.world import Channel, Installation, Json, User, World

_MOST_USES = 5
_LIFETIME_S = 1800.0


@dataclass(slots=True)
class _ResponseUrl:
    user: User
    app: Installation
    channel: Channel
    source: Message | None
    expires_at: float
    num_uses: int = 0


@dataclass(slots=True)
class Responses:
    world: World
    posting: Posting
    base_url: str = ""
    _urls: dict[str, _ResponseUrl] = field(default_factory=dict)

    def new_url(self, user: User, app: Installation, channel: Channel, source: Message | None = None) -> str:
        secret = secrets.token_hex(12)
        self._urls[secret] = _ResponseUrl(user, app, channel, source, self.world.clock.now() + _LIFETIME_S)
        return f"{self.base_url}/response/{secret}"

    def use(self, secret: str, body: Json) -> None:
        """Raises MethodError."""
        url = self._urls.get(secret)
        if url is None or self.world.clock.now() >= url.expires_at:
            raise MethodError("expired_url")
        if url.num_uses >= _MOST_USES:
            raise MethodError("used_url")
        url.num_uses += 1
        self.respond(url.user, url.app, url.channel, body, url.source)

    def respond(self, user: User, app: Installation, channel: Channel, body: Json, source: Message | None = None) -> None:
        """Posts, replaces or deletes as the body says; what was seen by one person alone stays so."""
        if body.get("delete_original") and source is not None:
            self.posting.delete(source)
            return
        text, blocks = str(body.get("text") or ""), body.get("blocks") or []
        if not text and not blocks:
            raise MethodError("no_text")
        if wrong := faults_of_blocks(blocks, MOST_IN_MESSAGE):
            raise MethodError("invalid_blocks", *wrong)
        if body.get("replace_original") and source is not None:
            self.posting.change(source, text, blocks)
            return
        only_for = None if body.get("response_type") == "in_channel" else user.id
        thread_ts = body.get("thread_ts")
        self.posting.post(channel, app.bot_user, text, blocks=blocks, thread_ts=thread_ts, app=app, only_for=only_for)
