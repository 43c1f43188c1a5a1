"""Records a real `frontdesk chat` as docs/session.svg: `python -m tests.record_session`. Starts a service of its own."""

import io
import os
import pty
import select
import subprocess
import sys
import time
from pathlib import Path

from rich.console import Console
from rich.text import Text

PICTURE = Path(__file__).parent.parent / "docs" / "session.svg"
COLUMNS, ROWS = 100, 60
LINES = (
    "I think I lost my debit card on the train, what now?",
    "yes, I have the app. and then?",
    "/new",
    "Translate into French: The train leaves at half past eight.",
    'And "thank you for waiting"?',
    "/new",
    "My daughter is three and has had a fever since yesterday",
    "/new",
    "hi there",
    "/quit",
)
_PROMPTS = ("you> ",)
_TIMEOUT_S = 300


def record() -> str:
    """Everything the terminal showed, with its colours."""
    leader, follower = pty.openpty()
    environment = {**os.environ, "COLUMNS": str(COLUMNS), "LINES": str(ROWS), "TERM": "xterm-256color"}
    command = [sys.executable, "-m", "prompt_bank.command_line", "chat"]
    with subprocess.Popen(command, stdin=follower, stdout=follower, stderr=subprocess.DEVNULL, env=environment) as chat:
        os.close(follower)
        shown = _until_prompt(leader)
        for line in LINES:
            os.write(leader, f"{line}\n".encode())
            shown += _until_prompt(leader)
        os.close(leader)
        assert chat.wait(60) == 0
    return shown.replace("\r\n", "\n")


def _until_prompt(leader: int) -> str:
    shown, deadline = "", time.monotonic() + _TIMEOUT_S
    while not shown.endswith(_PROMPTS) and time.monotonic() < deadline:
        if not select.select([leader], [], [], 1)[0]:
            continue
        try:
            shown += os.read(leader, 65536).decode()
        except OSError:  # the chat has ended and closed its side
            break
    return shown


def main() -> None:
    console = Console(record=True, width=COLUMNS, file=io.StringIO(), force_terminal=True)
    console.print(Text.from_ansi(f"$ make chat\n{record()}"))
    PICTURE.write_text(console.export_svg(title="frontdesk chat"), encoding="utf-8")


if __name__ == "__main__":
    main()
