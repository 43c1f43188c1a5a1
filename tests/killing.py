"""Ends this process at a chosen step of our code, as a power cut or `kill -9` would."""

import itertools
import os
import signal
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any

import prompt_bank

_BANK = str(Path(prompt_bank.__file__).parent)
# What changes files, also where a library does it for the bank. `open` counts when it is for writing.
_CHANGES = {"os.link", "os.mkdir", "os.remove", "os.rename", "os.rmdir", "os.truncate", "shutil.rmtree"}


def at_every_step(call: Callable[[int], None], code: tuple[str, ...] = (_BANK,)) -> None:
    """Calls `call` with 1, 2, 3, ... before each thing this process does from now on, in this thread and in new ones.

    A thing is a line of the files whose paths begin so (prompt_bank's unless others are given) or a change of a file; frames
    that run already are not counted.
    """
    steps = itertools.count(1)

    def trace(frame: FrameType, event: str, _: Any) -> Callable[..., Any] | None:
        if not frame.f_code.co_filename.startswith(code):
            return None
        if event == "line":
            call(next(steps))
        return trace

    def audit(event: str, arguments: tuple[Any, ...]) -> None:
        if event in _CHANGES or (event == "open" and arguments[2] & (os.O_WRONLY | os.O_RDWR)):
            call(next(steps))

    sys.addaudithook(audit)
    threading.settrace(trace)
    sys.settrace(trace)


def die_at(step: int, code: tuple[str, ...] = (_BANK,)) -> None:
    """SIGKILL before the `step`-th thing from now on."""

    def kill(current: int) -> None:
        if current == step:
            os.kill(os.getpid(), signal.SIGKILL)

    at_every_step(kill, code)
