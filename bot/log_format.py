"""How a log line is written: one line, whatever strangers put into it. Used by every command that logs."""

import logging
import re
from types import TracebackType

# Control characters, Unicode's own line ends, and the marks that turn text around: with them a stranger's text could look like
# a line of ours. Halves of surrogate pairs cannot be written at all.
_UNSAFE = re.compile("[\x00-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028\u2029\u202a-\u202e\u2066-\u2069\ud800-\udfff]")
_MARGIN = "  | "


def escaped(text: str) -> str:
    return _UNSAFE.sub(lambda found: found[0].encode("unicode_escape").decode(), text)


class LineFormatter(logging.Formatter):
    """A traceback keeps its lines, behind a margin that no line of the log begins with."""

    def __init__(self) -> None:
        super().__init__("%(asctime)s %(levelname)s %(name)s: %(message)s")

    def formatMessage(self, record: logging.LogRecord) -> str:  # noqa: N802
        return escaped(super().formatMessage(record))

    def formatException(  # noqa: N802
        self, exc_info: tuple[type[BaseException], BaseException, TracebackType | None] | tuple[None, None, None]
    ) -> str:
        return _behind_margin(super().formatException(exc_info))

    def formatStack(self, stack_info: str) -> str:  # noqa: N802
        return _behind_margin(super().formatStack(stack_info))


def _behind_margin(text: str) -> str:
    return "\n".join(f"{_MARGIN}{escaped(line)}" for line in text.split("\n"))
