"""How turns become token ids and a loss mask: the one agreement between training and serving.

The markup around a message is read off the model's own chat template once, by rendering sentinel texts, so that a text can be
tokenised apart from its markup: control tokens typed by a person stay plain text, and the template's default system message
is never inserted. A model without a template gets the plain format:

    {system}\\n\\nUser: {user}\\nAssistant: {answer}{eos}\\nUser: ...

Knows nothing of soft prompts: the virtual tokens stand before everything rendered here.
"""

import hashlib
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from jinja2 import TemplateError

from prompt_bank.conversation import Message
from prompt_bank.errors import EmptyMessageError, MessageTooLongError

log = logging.getLogger(__name__)

# When the oldest turns must go, they go down to this share of the context, so that the turns that stay keep their KV a while.
KEPT_SHARE = 0.6

_SYSTEM, _USER, _ANSWER = "\u2402S\u2403", "\u2402U{}\u2403", "\u2402A{}\u2403"

_PROBES: tuple[tuple[Message, ...], ...] = (
    (Message(role="user", content="Hello"),),
    (
        Message(role="system", content="Be brief."),
        Message(role="user", content=" 12 apples,\n two  spaces <|im_end|></s>"),
        Message(role="assistant", content="Où est la gare ?"),
        Message(role="user", content="Thanks 🙂"),
    ),
)


@dataclass(frozen=True, slots=True)
class Markup:
    """What stands between the texts of a conversation. `first_user` opens a conversation that has no system message."""

    system: str
    first_user: str
    user_after_system: str
    user_after_answer: str
    answer: str
    end: str


@dataclass(frozen=True, slots=True)
class Rendered:
    """Token ids of a conversation, and for each id whether it is part of an answer (and so of the training loss)."""

    token_ids: list[int]
    loss_mask: list[bool]
    num_dropped_messages: int = 0


class ChatFormat:
    """Renders conversations for one tokenizer. Immutable; safe to use from any thread."""

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self.markup = _read_markup(tokenizer)

    @cached_property
    def digest(self) -> str:
        """SHA-256 over the token ids and masks of fixed probe conversations, so refactoring orphans no version."""
        digest = hashlib.sha256()
        for probe in _PROBES:
            rendered = self.render(probe, context_tokens=1_000_000)
            digest.update(repr((rendered.token_ids, rendered.loss_mask)).encode())
        return digest.hexdigest()

    def render(self, messages: Sequence[Message], context_tokens: int) -> Rendered:
        """The ids of `messages`; after a user's message, the opening of the answer to come.

        When they exceed `context_tokens` the oldest turns are dropped in a block. Raises MessageTooLongError when the last turn
        alone (with the system message) is too long, and EmptyMessageError when there is nothing to answer.
        """
        if not any(message.role == "user" for message in messages):
            raise EmptyMessageError("the conversation has no user message; expected at least one")
        system = [message for message in messages[:1] if message.role == "system"]
        spoken = messages[len(system) :]
        rendered = self._render(system, spoken)
        if len(rendered.token_ids) <= context_tokens:
            return rendered
        num_dropped = 0
        while len(rendered.token_ids) > context_tokens * KEPT_SHARE:
            if len(spoken) - num_dropped <= 2:
                break
            num_dropped += 2
            rendered = self._render(system, spoken[num_dropped:])
        if len(rendered.token_ids) > context_tokens:
            raise MessageTooLongError(
                f"the last message takes {len(rendered.token_ids)} tokens with its system message, at most "
                f"{context_tokens} fit; send a shorter message"
            )
        return Rendered(rendered.token_ids, rendered.loss_mask, num_dropped)

    def _render(self, system: Sequence[Message], spoken: Sequence[Message]) -> Rendered:
        token_ids: list[int] = []
        loss_mask: list[bool] = []

        def add(ids: list[int], is_answer: bool = False) -> None:
            token_ids.extend(ids)
            loss_mask.extend([is_answer] * len(ids))

        opening = self.markup.first_user
        if system:
            add(self._markup_ids(self.markup.system))
            add(self.text_ids(system[0].content))
            opening = self.markup.user_after_system
        for message in spoken:
            if message.role == "user":
                add(self._markup_ids(opening))
                add(self.text_ids(message.content))
                add(self._markup_ids(self.markup.answer))
            else:
                add(self.text_ids(message.content), is_answer=True)
                opening = self.markup.user_after_answer
        if spoken and spoken[-1].role == "assistant":
            add(self._markup_ids(self.markup.end))
        return Rendered(token_ids, self._with_stop_tokens(token_ids, loss_mask))

    def _with_stop_tokens(self, token_ids: list[int], loss_mask: list[bool]) -> list[bool]:
        """The mask with the first token after each answer in it: that is how a model learns to stop."""
        return [own or before for own, before in zip(loss_mask, [False, *loss_mask[:-1]], strict=True)]

    def text_ids(self, text: str) -> list[int]:
        """A person's or an answer's text; control tokens in it are plain text."""
        ids = self._tokenizer(text, add_special_tokens=False, split_special_tokens=True)["input_ids"]
        return [int(token) for token in ids]

    def _markup_ids(self, text: str) -> list[int]:
        return [int(token) for token in self._tokenizer(text, add_special_tokens=False)["input_ids"]]

    def decode(self, token_ids: Sequence[int]) -> str:
        text: str = self._tokenizer.decode(token_ids, skip_special_tokens=True)
        return text


def _read_markup(tokenizer: Any) -> Markup:
    if not tokenizer.chat_template:
        return _plain_markup(tokenizer)
    try:
        return _template_markup(tokenizer)
    except (TemplateError, ValueError) as error:
        log.warning("the model's chat template cannot be read (%s); using the plain format", error)
        return _plain_markup(tokenizer)


def _plain_markup(tokenizer: Any) -> Markup:
    bos, eos = tokenizer.bos_token or "", tokenizer.eos_token or ""
    return Markup(
        system=bos,
        first_user=f"{bos}User: ",
        user_after_system="\n\nUser: ",
        user_after_answer=f"{eos}\nUser: ",
        answer="\nAssistant: ",
        end=f"{eos}\n",
    )


def _template_markup(tokenizer: Any) -> Markup:
    """The pieces between sentinels. Raises ValueError when the template is not the same from turn to turn."""
    users, answers = [_USER.format(n) for n in (1, 2)], [_ANSWER.format(n) for n in (1, 2)]
    texts = [_SYSTEM, users[0], answers[0], users[1], answers[1]]
    system, after_system, answer, after_answer, second_answer, end = _split(tokenizer, texts, has_system=True)
    bare_opening, _, _, _, _ = _split(tokenizer, texts[1:], has_system=False)
    if answer != second_answer:
        raise ValueError(f"answers open with {answer!r} and then with {second_answer!r}")
    if not after_answer.startswith(end):
        first_user = bare_opening
    else:
        bos = tokenizer.bos_token or ""
        opening = after_answer.removeprefix(end)
        first_user = opening if not bos or opening.startswith(bos) or not system.startswith(bos) else bos + opening
    return Markup(system, first_user, after_system, after_answer, answer, end)


def _split(tokenizer: Any, texts: list[str], has_system: bool) -> list[str]:
    """The rendered template around `texts`: one piece before each, and the last after all."""
    roles = ["system"] * has_system + ["user", "assistant", "user", "assistant"]
    messages = [{"role": role, "content": text} for role, text in zip(roles, texts, strict=True)]
    rest: str = tokenizer.apply_chat_template(messages, tokenize=False)
    pieces = []
    for text in texts:
        piece, found, rest = rest.partition(text)
        if not found:
            raise ValueError(f"the template leaves out or changes a message's text ({text!r})")
        pieces.append(piece)
    return [*pieces, rest]
