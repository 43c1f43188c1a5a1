"""Settings of the bank and the model, from environment variables that start with FRONTDESK_ and from a `.env` file."""

from pathlib import Path
from typing import Literal

from platformdirs import user_cache_path, user_data_path
from pydantic import Field, ValidationError
from pydantic_settings import BaseSettings, SettingsConfigDict

from prompt_bank.errors import ServiceError
from prompt_bank.model_files import SMOLLM2

DTypeName = Literal["auto", "float32", "bfloat16", "float16"]
WhenRedisIsDown = Literal["refuse", "serve_last_known"]


class BankSettings(BaseSettings):
    """What every command needs to know."""

    model_config = SettingsConfigDict(env_prefix="FRONTDESK_", env_file=".env", extra="ignore", frozen=True)

    data_dir: Path = Field(
        default_factory=lambda: user_data_path("frontdesk", appauthor=False),
        description="folder of the bank, the conversation log and the embedded Valkey",
    )
    models_dir: Path = Field(
        default_factory=lambda: user_cache_path("frontdesk", appauthor=False) / "models",
        description="folder of fetched models; can be deleted, they are fetched again",
    )
    base_model: str = Field(default=SMOLLM2.name, description="embedded model, Hugging Face folder, or hub id")
    device: str = Field(default="auto", description="auto, cpu, cuda, cuda:1, ...")
    dtype: DTypeName = Field(default="auto", description="auto takes bfloat16 where the processor multiplies it natively")
    redis_url: str | None = Field(default=None, description="any Redis 7 or Valkey; unset starts the embedded Valkey")
    when_redis_is_down: WhenRedisIsDown = Field(
        default="refuse", description="refuse turns, or serve_last_known versions, while Redis is away"
    )
    redis_timeout_s: float = Field(default=2.0, gt=0, le=60, description="how long Redis may take before it counts as away")
    redis_memory_mb: int = Field(default=256, ge=16, description="memory of the embedded Valkey: prompts by digest, pointers")
    blob_ttl_s: int = Field(default=86_400, ge=60, description="how long Redis keeps an unused soft prompt")
    log_level: Literal["debug", "info", "warning", "error"] = Field(default="info", description="least level logged")

    @classmethod
    def load(cls) -> "BankSettings":
        """Raises ServiceError naming the variable and what was expected."""
        try:
            return cls()
        except ValidationError as error:
            problem = error.errors(include_url=False)[0]
            name = f"FRONTDESK_{str(problem['loc'][0]).upper()}"
            raise ServiceError(f"setting {name}={problem['input']!r}: {problem['msg']}") from error
