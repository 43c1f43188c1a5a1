"""Tokens and what they may do, from the OAuth code over rotation to the end."""

import secrets
from dataclasses import dataclass, field
from typing import Literal

from bot.channels.slack.sandbox.clock import Clock
from bot.channels.slack.sandbox.errors import MethodError
from bot.channels.slack.sandbox.world import App, Installation, Workspace

TOKEN_LIFETIME_S = 43_200
CODE_LIFETIME_S = 600.0


@dataclass(slots=True)
class Token:
    value: str
    kind: Literal["bot", "app"]
    app: App
    installation: Installation | None
    expires_at: float | None = None
    is_revoked: bool = False


@dataclass(slots=True)
class _Code:
    app: App
    workspace: Workspace
    user_id: str
    scopes: frozenset[str]
    redirect_uri: str | None
    expires_at: float
    is_used: bool = False


@dataclass(slots=True)
class Grant:
    """What a code or a refresh token is exchanged for."""

    token: Token
    installation: Installation
    refresh_token: str | None = None


@dataclass(slots=True)
class Credentials:
    clock: Clock
    _tokens: dict[str, Token] = field(default_factory=dict)
    _codes: dict[str, _Code] = field(default_factory=dict)
    _refresh_tokens: dict[str, Installation] = field(default_factory=dict)

    def add_app_token(self, app: App) -> None:
        self._tokens[app.app_token] = Token(app.app_token, "app", app, None)

    def grant(self, installation: Installation) -> Grant:
        """A new bot token; one that expires, with a refresh token, where the app rotates its tokens."""
        rotates = installation.app.rotates_tokens
        secret = secrets.token_hex(12)
        value = f"xoxe.xoxb-1-{secret}" if rotates else f"xoxb-{installation.workspace.id}-{secret}"
        expires_at = self.clock.now() + TOKEN_LIFETIME_S if rotates else None
        token = self._tokens[value] = Token(value, "bot", installation.app, installation, expires_at)
        if not rotates:
            return Grant(token, installation)
        refresh_token = f"xoxe-1-{secrets.token_hex(12)}"
        self._refresh_tokens[refresh_token] = installation
        return Grant(token, installation, refresh_token)

    def bot_token(self, installation: Installation) -> str:
        """The newest that counts, or a new one."""
        for token in reversed(self._tokens.values()):
            if token.installation is installation and not token.is_revoked and not self._has_expired(token):
                return token.value
        return self.grant(installation).token.value

    def check(self, value: str | None) -> Token:
        """Raises MethodError with Slack's word for what is wrong with a token."""
        if value is None:
            raise MethodError("not_authed")
        token = self._tokens.get(value)
        if token is None:
            raise MethodError("invalid_auth")
        if token.installation is not None and not token.installation.is_live:
            raise MethodError("account_inactive")
        if token.is_revoked:
            raise MethodError("token_revoked")
        if self._has_expired(token):
            raise MethodError("token_expired")
        return token

    def _has_expired(self, token: Token) -> bool:
        return token.expires_at is not None and self.clock.now() >= token.expires_at

    def revoke(self, installation: Installation) -> None:
        """All of the installation's tokens; refresh tokens with them."""
        for token in self._tokens.values():
            if token.installation is installation:
                token.is_revoked = True
        for value in [value for value, owner in self._refresh_tokens.items() if owner is installation]:
            del self._refresh_tokens[value]

    def new_code(self, app: App, workspace: Workspace, user_id: str, scopes: frozenset[str], redirect_uri: str | None) -> str:
        code = f"{workspace.id}.{secrets.token_hex(12)}"
        self._codes[code] = _Code(app, workspace, user_id, scopes, redirect_uri, self.clock.now() + CODE_LIFETIME_S)
        return code

    def take_code(self, app: App, value: str, redirect_uri: str | None) -> tuple[Workspace, str, frozenset[str]]:
        """Workspace, installer and scopes of a code, which counts once."""
        code = self._codes.get(value)
        if code is None or code.app is not app or self.clock.now() >= code.expires_at:
            raise MethodError("invalid_code")
        if code.is_used:
            raise MethodError("code_already_used")
        if code.redirect_uri != redirect_uri:
            raise MethodError("bad_redirect_uri")
        code.is_used = True
        return code.workspace, code.user_id, code.scopes

    def take_refresh_token(self, app: App, value: str) -> Installation:
        """The installation of a refresh token, which counts once."""
        installation = self._refresh_tokens.get(value)
        if installation is None or installation.app is not app or not installation.is_live:
            raise MethodError("invalid_refresh_token")
        del self._refresh_tokens[value]
        return installation
