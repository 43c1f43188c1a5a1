"""Streaming text: pieces join to the whole, characters are never broken, stop strings never shown."""

from hypothesis import given
from hypothesis import strategies as st

from bot.text_stream import TextStream, contains_any
from prompt_bank.base_model import BaseModel


def decode_bytes(ids: list[int]) -> str:
    """A byte-level tokenizer: one id a byte, so that characters do break across tokens."""
    return bytes(ids).decode("utf-8", errors="replace")


def stream(text: str, stops: tuple[str, ...] = ()) -> tuple[list[str], str]:
    ids = list(text.encode())
    streamed = TextStream(decode_bytes, stops)
    pieces = [streamed.push(ids[: end + 1], is_last=end + 1 == len(ids)) for end in range(len(ids))]
    return pieces, streamed.text


@given(st.text(st.characters(exclude_characters="\0\ufffd", codec="utf-8"), min_size=1))
def test_pieces_join_to_the_text(text: str) -> None:
    pieces, shown = stream(text)
    assert "".join(pieces) == shown == text
    assert not any("\ufffd" in piece for piece in pieces)


@given(st.text(alphabet="abc", min_size=1, max_size=30), st.lists(st.text(alphabet="abc", min_size=1, max_size=4), min_size=1))
def test_a_stop_string_is_never_shown_not_even_its_beginning(text: str, stops: list[str]) -> None:
    ends = [end for end in range(1, len(text) + 1) if any(stop in text[:end] for stop in stops)]
    text = text[: min(ends, default=len(text))]  # the engine stops there
    pieces, shown = stream(text, tuple(stops))
    first = min((position for stop in stops if (position := text.find(stop)) >= 0), default=len(text))
    assert "".join(pieces) == shown == text[:first]


@given(st.text(min_size=1, max_size=40), st.text(min_size=1, max_size=5))
def test_the_stop_condition_sees_what_the_stream_sees(text: str, stop: str) -> None:
    ids = list(text.encode())
    condition = contains_any(decode_bytes, (stop,))
    stopped_at = next((end for end in range(1, len(ids) + 1) if condition(ids[:end])), None)
    assert (stopped_at is not None) == (stop in text)


def test_a_nul_is_never_shown() -> None:
    pieces, shown = stream("a\0b\0")
    assert "".join(pieces) == shown == "a\ufffdb\ufffd"


def test_the_tokens_that_have_a_part_in_the_text() -> None:
    ids = list("ab🙂c".encode())
    streamed = TextStream(decode_bytes, ("c",))
    counts = []
    for end in range(1, len(ids) + 1):
        streamed.push(ids[:end], is_last=end == len(ids))
        counts.append(streamed.num_shown_tokens)
    assert counts == [1, 2, 2, 2, 2, 6, 6]  # all four of the character at once, none of the stop string
    assert streamed.text == "ab🙂"


def test_with_the_real_tokenizer(tiny: BaseModel) -> None:
    text = "Où est la gare ? 🙂 Merci, ça va.\n\n1. one  two"
    ids = tiny.tokenizer(text)["input_ids"]
    streamed = TextStream(tiny.tokenizer.decode)
    pieces = [streamed.push(ids[: end + 1], is_last=end + 1 == len(ids)) for end in range(len(ids))]
    assert "".join(pieces) == text
    assert len([piece for piece in pieces if piece]) > 10
