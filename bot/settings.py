"""Settings of the service, beside those of the bank: environment variables that start with FRONTDESK_, or a `.env` file."""

import os
from ipaddress import ip_address
from typing import Literal

from pydantic import Field, SecretStr

from bot.conversations.database import sqlite_url
from prompt_bank.errors import ServiceError
from prompt_bank.settings import BankSettings

_PREFIX = "FRONTDESK_"


class Settings(BankSettings):
    """What `frontdesk serve` needs to know."""

    host: str = Field(default="127.0.0.1", description="address to listen on; beyond this machine, API keys are required")
    port: int = Field(default=8080, ge=0, le=65535, description="port to listen on; 0 takes a free one")
    database_url: SecretStr | None = Field(
        default=None,
        description="conversation log: sqlite:///FILE or postgresql://USER:PASSWORD@HOST/DATABASE; unset is a file in the data "
        "folder",
    )
    api_keys: Literal["auto", "required", "off"] = Field(
        default="auto", description="required, off, or auto: required as soon as the service listens beyond this machine"
    )
    api_key: SecretStr | None = Field(default=None, description="API key that `frontdesk chat` and `ask` send")
    rate_per_minute: int = Field(default=600, ge=1, description="turns a minute of an API key without a limit of its own")
    person_rate_per_minute: int = Field(default=60, ge=1, description="turns a minute of a person that an API key speaks for")
    max_concurrent: int = Field(default=64, ge=1, description="turns at a time of an API key without a limit of its own")
    max_streams: int = Field(default=200, ge=1, description="event streams that an API key may hold open")
    person_concurrent: int = Field(default=4, ge=1, description="turns at a time of a person that an API key speaks for")
    default_domain: str | None = Field(
        default=None, description="domain that answers when the router abstains; unset asks the person a clarifying question"
    )
    context_tokens: int = Field(default=2048, ge=128, description="most tokens of prompt, history and answer together")
    max_batch: int = Field(default=16, ge=1, le=256, description="conversations decoded together")
    max_waiting: int = Field(default=64, ge=1, description="requests that may wait for a place in the batch")
    max_message_chars: int = Field(default=20_000, ge=100, description="longest message taken")
    max_body_bytes: int = Field(default=4_000_000, ge=1000, description="largest body of a request taken")
    request_timeout_s: float = Field(
        default=30.0, gt=0, description="seconds that a client may take to send a request's headers, and its body"
    )
    max_open_requests: int = Field(default=2000, ge=1, description="requests open at a time; more are refused at once")
    prefix_cache_mb: int = Field(default=512, ge=16, description="memory for prefix KV of soft prompts")
    inbox_messages: int = Field(default=10_000, ge=1, description="acknowledged messages that may wait for their answers")
    inbox_conversation_messages: int = Field(default=20, ge=1, description="messages of one conversation that may wait")
    lease_s: float = Field(
        default=15.0,
        ge=1,
        le=600,
        description="after how many seconds without a sign of life another process takes a conversation",
    )
    drain_s: float = Field(default=10.0, ge=0, description="seconds that answers under way may take at shutdown")

    @property
    def log_url(self) -> str:
        """The conversation log's database."""
        if self.database_url is not None:
            return self.database_url.get_secret_value()
        return sqlite_url(self.data_dir / "conversations.db")

    @property
    def is_local(self) -> bool:
        """Whether only this machine reaches the service. A name that is not known to mean it does not."""
        try:
            return self.host == "localhost" or ip_address(self.host).is_loopback
        except ValueError:
            return False

    @property
    def requires_keys(self) -> bool:
        return self.api_keys == "required" or (self.api_keys == "auto" and not self.is_local)

    @classmethod
    def load(cls) -> "Settings":
        """Raises ServiceError naming the variable, also for a FRONTDESK_ variable that no setting has."""
        known = {f"{_PREFIX}{name.upper()}" for name in cls.model_fields}
        unknown = sorted(name for name in os.environ if name.startswith(_PREFIX) and name not in known)
        if unknown:
            raise ServiceError(f"{unknown[0]} is no setting of Frontdesk; known are {', '.join(sorted(known))}")
        settings = super().load()
        assert isinstance(settings, cls)
        return settings
