"""A card's checks name file and field; a card survives its own TOML."""

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from prompt_bank.card import Card, Sampling, read_card
from prompt_bank.errors import CardError
from prompt_bank.starter import STARTER_DIR, starter_domains
from tests.prompt_bank.conftest import make_card


@pytest.mark.parametrize(
    ("field", "value", "problem"),
    [
        ("name", "Banking", "name: "),
        ("name", "../banking", "name: "),
        ("name", "banking\n", "name: "),
        ("name", "", "name: "),
        ("name", "a" * 49, "name: "),
        ("name", "auto", "name: 'auto' is reserved for routed requests"),
        ("title", "", "title: "),
        ("title", "  ", "title: has the blank text"),
        ("brief", "\n", "brief: has the blank text"),
        ("brief", "x" * 20_001, "brief: "),
        ("examples", ["one", "two"], "examples: "),
        ("examples", ["one", "two", " "], "examples: has the blank text"),
        ("suggested_prompts", list("abcde"), "suggested_prompts: "),
        ("sampling", {"temperature": 3}, "sampling.temperature: "),
        ("sampling", {"temperature": float("nan")}, "sampling.temperature: "),
        ("sampling", {"max_tokens": 0}, "sampling.max_tokens: "),
        ("sampling", {"heat": 1}, "sampling.heat: "),
        ("colour", "red", "colour: "),
    ],
)
def test_bad_field_is_refused_by_file_and_field(tmp_path: Path, field: str, value: object, problem: str) -> None:
    import tomli_w

    path = tmp_path / "card.toml"
    path.write_text(tomli_w.dumps(make_card().model_dump() | {field: value}))
    with pytest.raises(CardError) as refused:
        read_card(path)
    assert str(refused.value).startswith(f"{path}: {problem}")
    assert "\n" not in str(refused.value)


def test_missing_field_is_named(tmp_path: Path) -> None:
    path = tmp_path / "card.toml"
    path.write_text('name = "banking"\n')
    with pytest.raises(CardError, match=r"card\.toml: title: Field required"):
        read_card(path)


@pytest.mark.parametrize(
    ("content", "problem"),
    [(b"name = ", "not valid TOML"), (b'name = "\xff"', "byte 8 is not UTF-8"), (None, "cannot be read")],
)
def test_unreadable_card_is_refused_by_file(tmp_path: Path, content: bytes | None, problem: str) -> None:
    path = tmp_path / "card.toml"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(CardError, match=problem) as refused:
        read_card(path)
    assert str(refused.value).startswith(str(path))


def test_card_saved_by_a_windows_editor_is_read(tmp_path: Path) -> None:
    path = tmp_path / "card.toml"
    path.write_bytes(b"\xef\xbb\xbf" + make_card(brief="One.\nTwo.").to_toml().replace("\n", "\r\n").encode())
    assert read_card(path) == make_card(brief="One.\nTwo.")


# What a terminal would obey is refused.
characters = st.one_of(st.sampled_from("\n\r\t"), st.characters(exclude_categories=["Cc", "Cs", "Cf"]))


def texts(max_size: int) -> st.SearchStrategy[str]:
    return st.text(characters, min_size=1, max_size=max_size).filter(str.strip)


cards = st.builds(
    Card,
    name=st.from_regex(r"[a-z][a-z0-9_-]{0,47}", fullmatch=True).filter(lambda name: name != "auto"),
    title=texts(80),
    description=texts(500),
    brief=texts(500),
    examples=st.lists(texts(60), min_size=3, max_size=6).map(tuple),
    suggested_prompts=st.lists(texts(60), max_size=4).map(tuple),
    disclaimer=st.text(characters, max_size=100),
    sampling=st.builds(
        Sampling,
        temperature=st.floats(0, 2),
        top_p=st.floats(0.01, 1),
        top_k=st.integers(0, 500),
        repetition_penalty=st.floats(1, 2),
        max_tokens=st.integers(1, 4096),
    ),
)


def with_plain_line_ends(value: object) -> object:
    if isinstance(value, str):
        return value.replace("\r\n", "\n")
    if isinstance(value, dict):
        return {key: with_plain_line_ends(item) for key, item in value.items()}
    if isinstance(value, tuple):
        return tuple(with_plain_line_ends(item) for item in value)
    return value


@given(cards)
def test_toml_round_trip(card: Card) -> None:
    read = Card.from_toml(card.to_toml(), "card.toml")
    assert with_plain_line_ends(read.model_dump()) == with_plain_line_ends(card.model_dump())


def test_shipped_cards_are_valid() -> None:
    assert starter_domains() == ["banking", "healthcare", "translation"]
    for domain in starter_domains():
        assert read_card(STARTER_DIR / domain / "card.toml").name == domain
