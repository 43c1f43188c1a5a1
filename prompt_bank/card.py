"""A domain's card: everything an operator writes by hand about a domain, as a TOML file."""

import re
import tomllib
from pathlib import Path

import tomli_w
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

from prompt_bank.conversation import first_problem
from prompt_bank.errors import CardError

# Also a folder and a model name of the API: no separators, no dots, nothing a shell would read.
DOMAIN_PATTERN = r"^[a-z][a-z0-9_-]{0,47}$"
# tomllib's memory grows with the square of a dotted key's length: one of 200 KB took all there was.
_KEY = r"""(?:[\w-]++|"(?:\\.|[^"\\\n])*+"|'[^'\n]*+')"""
_LONG_KEY = re.compile(rf"\.[ \t]*+{_KEY}(?:[ \t]*+\.[ \t]*+{_KEY}){{63}}", re.ASCII)
# Those of terminals, but tab and line ends, and those that reorder what a person reads.
_CONTROLS = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]")
ROUTED = "auto"  # the model name that leaves the choice of the domain to the router


class Sampling(BaseModel):
    """A domain's sampling defaults; a request may override each."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    temperature: float = Field(default=0.3, ge=0, le=2)
    top_p: float = Field(default=0.9, gt=0, le=1)
    top_k: int = Field(default=0, ge=0)
    repetition_penalty: float = Field(default=1.1, ge=1, le=2)
    max_tokens: int = Field(default=160, ge=1, le=4096)


class Card(BaseModel):
    """What a domain is. `brief` is the system message it is served with until it has a trained soft prompt."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str = Field(pattern=DOMAIN_PATTERN)
    title: str = Field(min_length=1, max_length=80)
    description: str = Field(min_length=1, max_length=500)
    brief: str = Field(min_length=1, max_length=20_000)
    examples: tuple[str, ...] = Field(min_length=3, max_length=1000)
    suggested_prompts: tuple[str, ...] = Field(default=(), max_length=4)
    disclaimer: str = Field(default="", max_length=500)
    sampling: Sampling = Sampling()

    @field_validator("name")
    @classmethod
    def _not_reserved(cls, name: str) -> str:
        if name == ROUTED:
            raise ValueError(f"{ROUTED!r} is reserved for routed requests; choose another name")
        return name

    def to_toml(self) -> str:
        """The card as `from_toml` reads it; line ends in texts of several lines become plain newlines."""
        return tomli_w.dumps(self.model_dump(), multiline_strings=True)

    @field_validator("title", "description", "brief", "examples", "suggested_prompts", "disclaimer")
    @classmethod
    def _no_controls(cls, texts: str | tuple[str, ...]) -> str | tuple[str, ...]:
        for text in (texts,) if isinstance(texts, str) else texts:
            if found := _CONTROLS.search(text):
                raise ValueError(f"has the control character {found[0]!r}, which a terminal would obey; leave it out")
        return texts

    @field_validator("title", "description", "brief", "examples", "suggested_prompts")
    @classmethod
    def _not_blank(cls, texts: str | tuple[str, ...]) -> str | tuple[str, ...]:
        for text in (texts,) if isinstance(texts, str) else texts:
            if not text.strip():
                raise ValueError(f"has the blank text {text!r}; write something or leave it out")
        return texts

    @classmethod
    def from_toml(cls, text: str, source: str) -> "Card":
        """Raises CardError naming `source` and the first problem."""
        if _LONG_KEY.search(text):
            raise CardError(f"{source}: has a key of more than 64 parts; a card's keys have one or two")
        try:
            return cls.model_validate(tomllib.loads(text))
        except ValidationError as error:
            raise CardError(f"{source}: {first_problem(error)}") from error
        except (ValueError, RecursionError) as error:  # beyond TOMLDecodeError: a number too long, a list too deep
            raise CardError(f"{source}: not valid TOML: {error}") from error


def read_card(path: Path) -> Card:
    """Raises CardError when the file cannot be read or is malformed."""
    try:
        return Card.from_toml(path.read_text(encoding="utf-8-sig"), str(path))
    except OSError as error:
        raise CardError(f"{path}: cannot be read ({error.strerror}); give the path of a card.toml") from error
    except UnicodeDecodeError as error:
        raise CardError(f"{path}: byte {error.start} is not UTF-8; save the card as UTF-8") from error
