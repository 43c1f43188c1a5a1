"""Ends this process at a chosen step of our code, as a power cut or `kill -9` would."""

import itertools
import os
import signal
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from types import FrameType, FunctionType
from typing import Any

import prompt_bank

_BANK = str(Path(prompt_bank.__file__).parent)
# What changes files, also where a library does it for the bank. `open` counts when it is for writing.
_CHANGES = {"os.link", "os.mkdir", "os.remove", "os.rename", "os.rmdir", "os.truncate", "shutil.rmtree"}


def at_every_step(call: Callable[[int], None], since: FunctionType | None = None, code: tuple[str, ...] = (_BANK,)) -> None:
    """Calls `call` with 1, 2, 3, ... before each thing this process does, in this thread and in new ones.

    A thing is a line of the files whose paths begin as in `code` (prompt_bank's unless others are given) or a change of a
    file; frames that run already are not counted. The first is the next one, or the first of the function `since`, once that is
    called.
    """
    steps = itertools.count(1)
    is_counting = since is None

    def trace(frame: FrameType, event: str, _: Any) -> Callable[..., Any] | None:
        nonlocal is_counting
        if not frame.f_code.co_filename.startswith(code):
            return None
        is_counting = is_counting or (since is not None and frame.f_code is since.__code__)
        if event == "line" and is_counting:
            call(next(steps))
        return trace

    def audit(event: str, arguments: tuple[Any, ...]) -> None:
        if is_counting and (event in _CHANGES or (event == "open" and arguments[2] & (os.O_WRONLY | os.O_RDWR))):
            call(next(steps))

    sys.addaudithook(audit)
    threading.settrace(trace)
    sys.settrace(trace)


def die_at(step: int, since: FunctionType | None = None, code: tuple[str, ...] = (_BANK,)) -> None:
    """SIGKILL before the `step`-th thing, counted as `at_every_step` does."""

    def kill(current: int) -> None:
        if current == step:
            os.kill(os.getpid(), signal.SIGKILL)

    at_every_step(kill, since, code)
