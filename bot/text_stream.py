"""From generated token ids to the text that may be shown: whole characters only, and nothing of a stop string."""

from bisect import bisect_left
from collections.abc import Callable, Sequence

_INCOMPLETE = "\ufffd"  # how a decoder shows the first bytes of a character whose last ones are still to come

_NUL = "\0"  # PostgreSQL stores none, and no text needs one: it is shown as a character that could not be read

Decode = Callable[[Sequence[int]], str]


class TextStream:
    """Gives text as it becomes certain. `text` is all that was given so far."""

    def __init__(self, decode: Decode, stop_strings: Sequence[str] = ()) -> None:
        self._decode = decode
        self._stop_strings = stop_strings
        self.text = ""
        self._starts: list[int] = []  # where each token's text begins
        self._num_decoded_chars = 0  # whole ones

    @property
    def num_shown_tokens(self) -> int:
        """How many tokens have a part in `text`. All tokens of a character begin where it does."""
        return bisect_left(self._starts, len(self.text))

    def push(self, token_ids: Sequence[int], is_last: bool) -> str:
        """The next piece of text, given all ids so far, one more each time.

        What could still become part of a stop string is held back.
        """
        decoded = self._decode(token_ids).replace(_NUL, _INCOMPLETE)
        self._starts.append(self._num_decoded_chars)
        self._num_decoded_chars = len(decoded.rstrip(_INCOMPLETE))
        certain = self._cut(decoded, is_last)
        piece = certain[len(self.text) :]
        self.text += piece
        return piece

    def _cut(self, text: str, is_last: bool) -> str:
        found = [position for stop in self._stop_strings if (position := text.find(stop)) >= 0]
        if found:
            return text[: min(found)]
        if is_last:
            return text
        text = text.rstrip(_INCOMPLETE)
        held_back = max((_overlap(text, stop) for stop in self._stop_strings), default=0)
        return text[: len(text) - held_back]


def _overlap(text: str, stop: str) -> int:
    """How many of the last characters of `text` are the beginning of `stop`."""
    return next((n for n in range(min(len(stop) - 1, len(text)), 0, -1) if text.endswith(stop[:n])), 0)


def contains_any(decode: Decode, stop_strings: Sequence[str]) -> Callable[[Sequence[int]], bool]:
    """A stop condition for the engine: one of `stop_strings` stands in the text so far."""
    longest = max(map(len, stop_strings))

    def is_stopped(token_ids: Sequence[int]) -> bool:
        # A token is at least a byte, a character at most four, and one token may complete a stop string.
        tail = decode(token_ids[-(4 * longest + 4) :])
        return any(stop in tail for stop in stop_strings)

    return is_stopped
