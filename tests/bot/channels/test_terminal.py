"""`frontdesk ask`, `chat` and `logs` against a running service, and once without any."""

import json
import os
import pty
import signal
import socket
import subprocess
import sys
from collections.abc import Callable
from contextlib import closing
from pathlib import Path

import pytest

from prompt_bank.conversation import read_conversations
from tests.bot.conftest import Frontdesk
from tests.bot.service import RunningService, environment


@pytest.fixture
def url(tiny_service: RunningService, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setenv("FRONTDESK_DATA_DIR", str(tiny_service.data_dir))
    return tiny_service.url


def test_ask_prints_the_answer_alone(frontdesk: Frontdesk, url: str) -> None:
    status, out, err = frontdesk("ask", "I lost my card", "--url", url)
    assert status == 0
    assert out.strip()
    assert err.startswith("banking v1, ")


def test_ask_shows_the_disclaimer(frontdesk: Frontdesk, url: str) -> None:
    _, out, err = frontdesk("ask", "I have a headache", "--domain", "healthcare", "--url", url)
    assert "not medical advice" in err
    assert "not medical advice" not in out


@pytest.mark.parametrize("ending", ["/", "/v1", "/v1/"])
def test_ask_as_json_tells_all(frontdesk: Frontdesk, url: str, ending: str) -> None:
    status, out, _ = frontdesk("ask", "I lost my card [/] :key:", "--json", "--url", url + ending)
    answer = json.loads(out)
    assert status == 0
    assert (answer["domain"], answer["version"], answer["digest"], answer["routing"]["reason"]) == (
        "banking",
        1,
        None,
        "routed",
    )
    assert set(answer) == {
        *("domain", "version", "digest", "text", "disclaimer", "routing", "first_token_ms", "total_ms"),
        *("prompt_tokens", "completion_tokens", "conversation_id", "turn_id"),
    }
    assert answer["completion_tokens"] > 0
    assert len(answer["turn_id"]) == 32
    explicit = json.loads(frontdesk("ask", "I lost my card", "--json", "--url", url, "--domain", "translation")[1])
    assert (explicit["domain"], explicit["routing"]["reason"]) == ("translation", "explicit")


def test_ask_where_no_domain_answers(frontdesk: Frontdesk, url: str) -> None:
    status, out, err = frontdesk("ask", "What is the capital of Mongolia?", "--url", url)
    assert status == 0
    assert out.startswith("I am not sure what your question is about.")
    assert err.startswith("router, ")


@pytest.mark.parametrize("command", [("ask", "Hello"), ("chat",)])
def test_a_service_that_is_not_there_is_one_line(frontdesk: Frontdesk, command: tuple[str, ...]) -> None:
    with closing(socket.create_server(("127.0.0.1", 0))) as free:
        address = f"http://127.0.0.1:{free.getsockname()[1]}"
    for nowhere in (address, "nonsense"):
        status, out, err = frontdesk(*command, "--url", nowhere)
        assert (status, out) == (1, "")
        assert err == f"error: no service answers at {nowhere}; check the address or start one with `frontdesk serve`\n"


@pytest.mark.parametrize(
    ("arguments", "problem"),
    [
        (("ask", " "), "error: a message of the user has no text; send one with text\n"),
        (("ask", "Hello", "-d", "cooking"), "error: no domain 'cooking' is live; there are: banking, "),
        (("ask", "x" * 30_000), "error: a message has 30000 characters, at most 20000 are taken; send a shorter one\n"),
    ],
)
def test_what_the_service_refuses_is_one_line(frontdesk: Frontdesk, url: str, arguments: tuple[str, ...], problem: str) -> None:
    status, out, err = frontdesk(*arguments, "--url", url)
    assert (status, out) == (1, "")
    assert err.startswith(problem)
    assert err.count("\n") == 1


def test_a_chat_with_every_command(frontdesk: Frontdesk, url: str, tmp_path: Path) -> None:
    typed = [
        "/up",  # nothing to vote on yet
        "What does a wire to Brazil cost, typed in the terminal?",
        "/up",
        "and to Chile?",
        "/down",
        "/domain cooking [/b]",
        "/domain healthcare",
        "Is this an answer?",
        "/auto",
        "/new",
        "Translate into French: terminal",
        "/domains",
        "/nonsense",
        "",
        "/quit",
        "never sent",
    ]
    status, out, err = frontdesk("chat", "--url", url, typed="\n".join(typed))
    assert (status, err) == (0, "")
    assert "with the domains banking, healthcare, translation." in out
    signatures = [line.split(" · ")[:2] for line in out.splitlines() if " · first token " in line]
    assert [(who.strip(), why.split()[0]) for who, why in signatures] == [
        ("banking v1", "routed"),
        ("banking v1", "kept"),
        ("healthcare v1", "explicit"),
        ("translation v1", "routed"),
    ]
    assert "there is no domain cooking [/b]; there are: banking" in out
    assert out.count("thank you, noted") == 2
    assert out.count("/domain NAME") == 2  # help: for the vote on nothing and for the unknown command

    exported = tmp_path / "export.jsonl"
    status, _, err = frontdesk("logs", "export", "--output", str(exported))
    assert (status, "Traceback" in err) == (0, False)
    (conversation,) = [
        one
        for one in read_conversations(exported)
        if one.messages[0].content == "What does a wire to Brazil cost, typed in the terminal?"
    ]
    said = [(message.content, message.domain, message.vote) for message in conversation.messages]
    assert [(domain, vote) for _, domain, vote in said[1::2]] == [("banking", "up"), ("banking", "down"), ("healthcare", None)]
    assert [question for question, _, _ in said[::2]] == [typed[1], typed[3], typed[7]]


def test_the_end_of_the_input_ends_a_chat(frontdesk: Frontdesk, url: str) -> None:
    assert frontdesk("chat", "--url", url, "--domain", "banking", typed="")[0] == 0


def test_feedback_joins_exactly_its_turn_and_version(frontdesk: Frontdesk, url: str, tiny_service: RunningService) -> None:
    asked = [json.loads(frontdesk("ask", f"Feedback {n}", "-d", "banking", "--json", "--url", url)[1]) for n in range(3)]
    with tiny_service.http as http:
        given = {"turn_id": asked[1]["turn_id"], "vote": "down", "reason": "wrong", "correction": "Call us."}
        response = http.post("/v1/feedback", json=given)
    assert (response.status_code, response.json()) == (201, {"turn_id": asked[1]["turn_id"]})
    status, out, _ = frontdesk("logs", "export", "--domain", "banking")
    assert status == 0
    answers = [
        message for line in out.splitlines() for message in json.loads(line)["messages"] if message["role"] == "assistant"
    ]
    by_turn = {answer["turn_id"]: answer for answer in answers}
    assert {answer["domain"] for answer in answers} == {"banking"}
    voted = by_turn[asked[1]["turn_id"]]
    assert (voted["vote"], voted["reason"], voted["correction"]) == ("down", "wrong", "Call us.")
    assert (voted["version"], voted["content"]) == (asked[1]["version"], asked[1]["text"])
    assert not any("vote" in by_turn[asked[n]["turn_id"]] for n in (0, 2))


def test_ask_without_any_service_starts_one(
    frontdesk: Frontdesk, monkeypatch: pytest.MonkeyPatch, tiny_model_dir: Path
) -> None:
    with closing(socket.create_server(("127.0.0.1", 0))) as free:
        port = free.getsockname()[1]
    monkeypatch.setenv("FRONTDESK_PORT", str(port))
    monkeypatch.setenv("FRONTDESK_BASE_MODEL", str(tiny_model_dir))
    status, out, err = frontdesk("ask", "I lost my card", "--json")
    assert status == 0
    assert json.loads(out)["domain"] == "banking"
    assert err.startswith("no service is running here: starting one for this command")
    refused, out, err = frontdesk("ask", "Hello", "--domain", "cooking")
    assert (refused, out) == (1, "")
    assert err.splitlines()[-1].startswith("error: no domain 'cooking' is live; there are: banking")


class Terminal:
    """`frontdesk chat` as a person sees it, on a pseudo-terminal."""

    def __init__(self, process: "subprocess.Popen[bytes]", screen: int) -> None:
        self.process = process
        self._screen = screen
        self.text = ""

    def type(self, text: str) -> None:
        os.write(self._screen, text.encode())

    def read_until(self, is_there: Callable[[str], bool]) -> None:
        while not is_there(self.text):
            try:
                self.text += os.read(self._screen, 4096).decode(errors="replace")
            except OSError as error:  # what a pseudo-terminal gives at its end
                raise AssertionError(self.text) from error


def test_ctrl_c_stops_an_answer_and_leaves_at_the_prompt(
    url: str, models_dir: Path, tmp_path: Path, tiny_service: RunningService
) -> None:
    screen, keyboard = pty.openpty()
    command = [sys.executable, "-m", "prompt_bank.command_line", "chat", "--url", url, "--domain", "banking"]
    with subprocess.Popen(
        command,
        stdin=keyboard,
        stdout=keyboard,
        stderr=keyboard,
        env={**environment(models_dir, tmp_path, {}), "TERM": "dumb"},
        start_new_session=True,
    ) as process:
        os.close(keyboard)
        terminal = Terminal(process, screen)
        try:
            terminal.read_until(lambda text: text.endswith("banking> "))
            terminal.type("Tell me everything about interrupted answers\n")
            terminal.read_until(lambda text: len(text.partition("answers\r\n")[2]) > 0)
            process.send_signal(signal.SIGINT)
            terminal.read_until(lambda text: text.count("banking> ") == 2)
            assert "stopped" in terminal.text
            terminal.type("/domains\n")
            terminal.read_until(lambda text: text.count("banking> ") == 3)
            process.send_signal(signal.SIGINT)
            assert process.wait(60) == 130
            assert "Traceback" not in terminal.text
        finally:
            process.kill()
            os.close(screen)
