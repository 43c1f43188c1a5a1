"""Roles, and the principal: who a request comes from and what it may do."""

import hashlib
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

from bot.conversations.records import Caller
from prompt_bank.errors import PermissionDeniedError

# chat: completions, models, feedback on its own turns. agent: chat, and everybody's conversations.
# trainer: models, domains and versions, export. admin: everything.
Role = Literal["chat", "agent", "trainer", "admin"]


@dataclass(frozen=True, slots=True)
class Principal:
    """`domains` None means all of them; limits None mean the settings' defaults."""

    id: str
    name: str
    role: Role
    domains: frozenset[str] | None = None
    rate_per_minute: int | None = None
    max_concurrent: int | None = None
    is_limited: bool = True

    @property
    def visible_scope(self) -> str | None:
        """Whose conversations it may read; None for everybody's."""
        return self.id if self.role == "chat" else None

    @property
    def readable_domains(self) -> frozenset[str] | None:
        """The domains whose turns it reads in others' conversations; its own it reads whole. None are all."""
        return None if self.role == "chat" else self.domains

    def caller(self, person: str | None) -> Caller:
        """Whose a conversation is that it begins for a person."""
        return Caller(self.id, person)

    def check_conversation(self, scope: str, domain: str | None) -> None:
        """Of a conversation that it sees: another caller's is to be in one of its domains. Raises PermissionDeniedError."""
        if scope != self.id and self.domains is not None and domain not in self.domains:
            raise forbidden_domain(domain or "none yet", self.domains)

    def check_domain(self, domain: str) -> None:
        """Raises PermissionDeniedError."""
        if self.domains is not None and domain not in self.domains:
            raise forbidden_domain(domain, self.domains)


# Everybody, while API keys are off.
LOCAL = Principal("api", "local", "admin", is_limited=False)


def person_digest(person: str) -> str:
    """Names a person in keys: whatever a caller calls them, it is short, and Redis learns no names."""
    return hashlib.sha256(person.encode()).hexdigest()[:32]


def forbidden_domain(domain: str, allowed: Iterable[str]) -> PermissionDeniedError:
    return PermissionDeniedError(
        f"this API key may not use the domain {domain!r}, only {', '.join(sorted(allowed))}; ask the operator for another key"
    )
