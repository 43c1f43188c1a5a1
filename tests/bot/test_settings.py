"""Settings and the command line: a mistake is one line on stderr that names it, never a traceback."""

import socket
from contextlib import closing
from pathlib import Path

import pytest

from bot.settings import Settings
from prompt_bank.errors import ServiceError
from tests.bot.conftest import Frontdesk


@pytest.mark.parametrize(
    ("name", "value", "problem"),
    [
        ("FRONTDESK_PORT", "eighty", "FRONTDESK_PORT='eighty': .*valid integer"),
        ("FRONTDESK_PORT", "", "FRONTDESK_PORT=''"),
        ("FRONTDESK_PORT", "70000", "FRONTDESK_PORT='70000': .*less than or equal to 65535"),
        ("FRONTDESK_MAX_BATCH", "0", "FRONTDESK_MAX_BATCH='0'"),
        ("FRONTDESK_DTYPE", "int4", "FRONTDESK_DTYPE='int4': .*bfloat16"),
        ("FRONTDESK_WHEN_REDIS_IS_DOWN", "panic", "FRONTDESK_WHEN_REDIS_IS_DOWN='panic': .*serve_last_known"),
        ("FRONTDESK_TYPO", "1", "FRONTDESK_TYPO is no setting of Frontdesk; known are .*FRONTDESK_PORT"),
        ("FRONTDESK_LOG_LEVEL", "chatty", "FRONTDESK_LOG_LEVEL='chatty'"),
    ],
)
def test_a_malformed_or_unknown_setting_is_named(
    monkeypatch: pytest.MonkeyPatch, frontdesk: Frontdesk, name: str, value: str, problem: str
) -> None:
    monkeypatch.setenv(name, value)
    with pytest.raises(ServiceError, match=problem):
        Settings.load()
    status, out, err = frontdesk("serve")
    assert (status, out) == (1, "")
    assert err.startswith("error: ")
    assert err.count("\n") == 1
    assert name in err


def test_every_setting_says_what_it_is() -> None:
    assert [name for name, field in Settings.model_fields.items() if not field.description] == []


def test_a_taken_port_is_one_line(frontdesk: Frontdesk) -> None:
    with closing(socket.create_server(("127.0.0.1", 0))) as other:
        port = other.getsockname()[1]
        status, _, err = frontdesk("serve", "--port", str(port))
    assert status == 1
    assert err.startswith(f"error: cannot listen on 127.0.0.1:{port} (Address already in use); stop what is there or set ")
    assert err.count("\n") == 1


def test_a_port_that_is_none_is_refused(frontdesk: Frontdesk) -> None:
    status, _, err = frontdesk("serve", "--port", "70000")
    assert status == 2
    assert "--port" in err
    assert "65535" in err


def test_a_corrupt_conversation_log_is_one_line(
    frontdesk: Frontdesk, monkeypatch: pytest.MonkeyPatch, tiny_model_dir: Path, tmp_path: Path
) -> None:
    monkeypatch.setenv("FRONTDESK_BASE_MODEL", str(tiny_model_dir))
    path = tmp_path / "data" / "conversations.db"
    path.parent.mkdir()
    path.write_bytes(b"SQLite format 3\0" + b"\xff" * 5000)
    status, _, err = frontdesk("serve", "--port", "0")
    assert status == 1
    error = err.splitlines()[-1]
    assert error.startswith(f"error: the conversation log {path} cannot be opened: ")
    assert "sqlalche.me" not in error
    assert "Traceback" not in err
    assert path.stat().st_size == 16 + 5000  # left as it was, for whoever mends it


def test_truncated_weights_are_one_line(
    frontdesk: Frontdesk, monkeypatch: pytest.MonkeyPatch, tiny_model_dir: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "model"
    folder.mkdir()
    for file in tiny_model_dir.iterdir():
        whole = file.read_bytes()
        (folder / file.name).write_bytes(whole[: len(whole) // 2] if file.suffix == ".safetensors" else whole)
    monkeypatch.setenv("FRONTDESK_BASE_MODEL", str(folder))
    status, out, err = frontdesk("serve", "--port", "0")
    assert (status, out) == (1, "")
    assert err.startswith(f"error: the model in {folder} cannot be loaded: ")
    assert err.count("\n") == 1


@pytest.mark.parametrize(
    ("name", "value", "problem"),
    [
        ("FRONTDESK_BASE_MODEL", "no such model!", "error: no model 'no such model!'"),
        ("FRONTDESK_DEFAULT_DOMAIN", "bankng", "error: setting FRONTDESK_DEFAULT_DOMAIN='bankng': no such domain is live; "),
        ("FRONTDESK_REDIS_URL", "mysql://x", "error: setting FRONTDESK_REDIS_URL: "),
        ("FRONTDESK_REDIS_URL", "unix:///nowhere/redis.sock", "error: redis does not answer: "),
    ],
)
def test_what_a_setting_names_must_be_there(
    frontdesk: Frontdesk, monkeypatch: pytest.MonkeyPatch, tiny_model_dir: Path, name: str, value: str, problem: str
) -> None:
    monkeypatch.setenv("FRONTDESK_BASE_MODEL", str(tiny_model_dir))
    monkeypatch.setenv(name, value)
    status, _, err = frontdesk("serve", "--port", "0")
    assert status == 1
    assert err.splitlines()[-1].startswith(problem)
    assert "Traceback" not in err


@pytest.mark.parametrize(
    "command",
    ["", "serve", "chat", "ask", "logs", "logs export", "logs search", "logs shadows", "inbox", "inbox list", "inbox replay",
     "keys", "keys add", "keys list", "keys revoke", "models", "models pull", "models list", "bank", "bank add",
     "bank list", "bank show", "bank promote", "train"],
)  # fmt: skip
def test_every_command_has_help(frontdesk: Frontdesk, command: str) -> None:
    status, out, err = frontdesk(*command.split(), "--help")
    assert (status, err) == (0, "")
    assert "Usage: " in out
    assert f"frontdesk {command}".rstrip() in out
