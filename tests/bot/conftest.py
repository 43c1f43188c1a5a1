"""Services on the tiny random model and on the real one. Tests that change what a service does start one of their own."""

import io
import sys
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from pathlib import Path

import httpx
import pytest

from bot.channels.http.server import serving
from bot.routing.encoder import Encoder
from bot.settings import Settings
from prompt_bank.base_model import BaseModel
from prompt_bank.command_line import main
from tests.bot.service import RunningService, running_service

# Opens a service in this process on the tiny model, with the given settings, and gives a client of it.
ServingHere = Callable[..., AbstractAsyncContextManager[httpx.AsyncClient]]
# Runs a command, with the lines of `typed` on its stdin, and gives exit status, stdout and stderr.
Frontdesk = Callable[..., tuple[int, str, str]]


@pytest.fixture(scope="session")
def tiny_model_dir(tiny: BaseModel, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The random two-layer model as a folder; its context is long, so that an answer can be made to take long."""
    folder = tmp_path_factory.mktemp("tiny-model")
    tiny.model.save_pretrained(folder)
    tiny.tokenizer.save_pretrained(folder)
    config = folder / "config.json"
    config.write_text(config.read_text().replace('"max_position_embeddings": 512', '"max_position_embeddings": 8192'))
    return folder


@pytest.fixture(scope="session")
def tiny_service(tiny_model_dir: Path, models_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningService]:
    data_dir = tmp_path_factory.mktemp("tiny-service")
    with running_service(models_dir, data_dir, FRONTDESK_BASE_MODEL=str(tiny_model_dir), FRONTDESK_DTYPE="float32") as service:
        yield service


@pytest.fixture(scope="session")
def real_service(smollm2_dir: Path, models_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningService]:
    """The default model with the starter domains; fp32, in which an answer does not depend on what else is in a batch."""
    with running_service(models_dir, tmp_path_factory.mktemp("real-service"), FRONTDESK_DTYPE="float32") as service:
        yield service


@pytest.fixture(scope="session")
def encoder(models_dir: Path) -> Encoder:
    return Encoder.from_models_dir(models_dir)


@pytest.fixture
def serving_here(tiny_model_dir: Path, tmp_path: Path) -> ServingHere:
    @asynccontextmanager
    async def open_here(**given: object) -> AsyncIterator[httpx.AsyncClient]:
        values = {"base_model": str(tiny_model_dir), "dtype": "float32", "data_dir": tmp_path / "data", **given}
        async with (
            serving(Settings(**values), lambda _: None) as url,  # type: ignore[arg-type]
            httpx.AsyncClient(base_url=url, timeout=60, trust_env=False) as client,
        ):
            yield client

    return open_here


@pytest.fixture
def frontdesk(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Frontdesk:
    """The command in this process, which has imported everything already."""

    def run(*arguments: str, typed: str = "") -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["frontdesk", *arguments])
        monkeypatch.setattr(sys, "stdin", io.StringIO(typed))
        capsys.readouterr()
        with pytest.raises(SystemExit) as ended:
            main()
        status = ended.value.code
        assert isinstance(status, int)
        return status, *capsys.readouterr()

    return run
