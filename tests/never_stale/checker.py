"""Says of every turn whether it was stale, mixed or logged wrongly, from what was promoted when. Pure: reads nothing.

Changes are totally ordered by their epoch. Whoever asks after a change returned is at that epoch at least, and so is whoever
asks after another was told a version that no earlier epoch had: nobody ever goes back, whichever service one asks.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Change:
    """One change of the pointer table: what is live from it on, when it was begun, and when (and if) it returned."""

    epoch: int
    live: int
    began_ns: int
    returned_ns: int | None


@dataclass(frozen=True)
class Turn:
    """An answer as its caller saw it. `started_ns` is when the first chunk came, `is_excused` that it may be stale."""

    id: str
    conversation: str
    sent_ns: int
    started_ns: int
    version: int
    digest: str | None
    last_version: int
    last_digest: str | None
    text: str
    is_excused: bool = False


@dataclass(frozen=True)
class Truth:
    """What a turn must have carried and said, and what the log has of it.

    `texts` are its version's answers: more than one where two tokens are equally likely but for rounding, which depends on
    what else is in the batch.
    """

    digest: str | None
    texts: frozenset[str]
    logged: tuple[int | None, str | None, str] | None  # version, digest, answer


def check(turns: Sequence[Turn], changes: Sequence[Change], truths: dict[str, Truth]) -> list[str]:
    """All that is wrong, one line each. `truths` are by turn id."""
    problems = []
    for turn in turns:
        problems += [f"turn {turn.id}, v{turn.version}: {problem}" for problem in _mixed(turn, truths[turn.id])]
    stale = _stale([turn for turn in turns if not turn.is_excused], changes)
    return [*problems, *(f"turn {turn.id}, v{turn.version}: {problem}" for turn, problem in stale)]


def _mixed(turn: Turn, truth: Truth) -> Iterator[str]:
    if (turn.last_version, turn.last_digest) != (turn.version, turn.digest):
        yield f"it ended as v{turn.last_version}"
    if turn.digest != truth.digest:
        yield f"digest {turn.digest}, the version's is {truth.digest}"
    if turn.text not in truth.texts:
        yield f"said {turn.text!r}, its version says {' or '.join(map(repr, truth.texts))}"
    if truth.logged != (turn.version, turn.digest, turn.text):
        yield f"logged as {truth.logged}"


def _stale(turns: Sequence[Turn], changes: Sequence[Change]) -> Iterator[tuple[Turn, str]]:
    """Gives each turn the earliest epoch it can have been claimed at, which binds those that were sent after it began."""
    told: list[tuple[int, int]] = []  # when somebody was told, and of which epoch
    for turn in sorted(turns, key=lambda turn: turn.sent_ns):
        least = least_epoch(turn, changes)
        least = max([least, *(epoch for at_ns, epoch in told if at_ns <= turn.sent_ns)])
        possible = [
            change.epoch
            for change in changes
            if change.epoch >= least and change.began_ns <= turn.started_ns and change.live == turn.version
        ]
        if possible:
            told.append((turn.started_ns, possible[0]))
        else:
            live = next(change.live for change in changes if change.epoch == least)
            yield turn, f"stale: sent when epoch {least} (v{live}) was known"


def least_epoch(turn: Turn, changes: Sequence[Change]) -> int:
    """The newest epoch that had returned when the turn was sent."""
    return max(change.epoch for change in changes if change.returned_ns is not None and change.returned_ns <= turn.sent_ns)
