"""How turns become token ids and a loss mask: the one agreement between training and serving.

The markup around a message is read off the model's own chat template once, by rendering sentinel texts, so that a text can be
tokenised apart from its markup: control tokens typed by a person stay plain text, and the template's default system message
is never inserted. A model without a template gets the plain format:

    {system}\\n\\nUser: {user}\\nAssistant: {answer}{eos}\\nUser: ...

So does a model whose template is not the same from turn to turn, with a warning. With a template that knows no system role
(Gemma, older Mistrals) the system message opens the first user message, two newlines before its text.

Knows nothing of soft prompts: the virtual tokens stand before everything rendered here.
"""

import copy
import hashlib
import json
import logging
import re
from collections.abc import Sequence
from dataclasses import astuple, dataclass
from functools import cached_property
from typing import Any

from jinja2 import TemplateError
from tokenizers import Tokenizer

from prompt_bank.conversation import Message
from prompt_bank.errors import BadRequestError, EmptyMessageError, MessageTooLongError
from prompt_bank.token_bytes import TokenBytes

log = logging.getLogger(__name__)

# When the oldest turns must go, they go down to this share of the context, so that the turns that stay keep their KV a while.
KEPT_SHARE = 0.6

_SYSTEM, _USER, _ANSWER = "\u2402S\u2403", "\u2402U{}\u2403", "\u2402A{}\u2403"

# Added tokens that look like markup, whether or not their tokenizer calls them special (Qwen's `<think>` is not).
_CONTROL_TOKEN = re.compile(r"<.+>|\[.+\]")

# Stands before every template: one that tells the date would otherwise give another chat format every day.
_FIXED_DATE = "{% macro strftime_now(format) %}26 Jul 2024{% endmacro %}"

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


Text = tuple[bool, list[int]]  # whether it is a user's, and its ids


class ChatFormat:
    """Renders conversations for one tokenizer. Immutable; safe to use from any thread."""

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer
        self.token_bytes = TokenBytes(tokenizer)
        self._text_tokenizer = _text_tokenizer(tokenizer)
        self.markup = _read_markup(tokenizer)
        self._markup_ids = {text: _ids(tokenizer, text) for text in astuple(self.markup)}
        self._control_ids = frozenset(tokenizer.added_tokens_decoder)

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
        alone (with the system message) is too long, EmptyMessageError when there is nothing to answer, and BadRequestError
        for a system message that is not the first.
        """
        if not any(message.role == "user" for message in messages):
            raise EmptyMessageError("the conversation has no user message; expected at least one")
        num_system = int(messages[0].role == "system")
        if any(message.role == "system" for message in messages[num_system:]):
            raise BadRequestError("a system message stands after other messages; expected it first")
        texts = [(message.role == "user", self.text_ids(message.content)) for message in messages]
        system, spoken = texts[:num_system], texts[num_system:]
        rendered = self._render(system, spoken)
        if len(rendered.token_ids) <= context_tokens:
            return rendered
        num_dropped = self._num_dropped(system, spoken, context_tokens)
        rendered = self._render(system, spoken[num_dropped:])
        if len(rendered.token_ids) > context_tokens:
            raise MessageTooLongError(
                f"the last message takes {len(rendered.token_ids)} tokens with its system message, at most "
                f"{context_tokens} fit; send a shorter message"
            )
        return Rendered(rendered.token_ids, rendered.loss_mask, num_dropped)

    def _num_dropped(self, system: Sequence[Text], spoken: Sequence[Text], context_tokens: int) -> int:
        """How many of the oldest messages must go.

        Replays the conversation: the window moves when it is full, by a block, and then stays. So whoever sends the whole
        history each time finds the same beginning, and its KV, for many turns.
        """
        turns = [index for index, (is_user, _) in enumerate(spoken) if is_user]
        first = 0
        for end in [*(index + 1 for index in turns[:-1]), len(spoken)]:
            limit: float = context_tokens
            for later in [turn for turn in turns if first < turn < end]:
                if len(self._render(system, spoken[first:end]).token_ids) <= limit:
                    break
                first, limit = later, context_tokens * KEPT_SHARE
        return first

    def _render(self, system: Sequence[Text], spoken: Sequence[Text]) -> Rendered:
        """Users and answers in turn; where one is missing, its text is empty."""
        token_ids: list[int] = []
        loss_mask: list[bool] = []

        def add(ids: list[int], num_loss_tokens: int = 0) -> None:
            token_ids.extend(ids)
            loss_mask.extend(index < num_loss_tokens for index in range(len(ids)))

        def add_opening(opening: str, is_answered: bool) -> None:
            ids = self._markup_ids[opening]
            add(ids, self._num_stop_tokens(ids) if is_answered else 0)

        opening, is_answered, in_user_turn = self.markup.first_user, False, False
        for _, ids in system:
            add(self._markup_ids[self.markup.system])
            add(ids)
            opening = self.markup.user_after_system
        for is_user, ids in spoken:
            if is_user or not in_user_turn:
                add_opening(opening, is_answered)
                add(ids if is_user else [])
                add(self._markup_ids[self.markup.answer])
                opening = self.markup.user_after_answer
            if not is_user:
                add(ids, len(ids))
            in_user_turn, is_answered = is_user, not is_user
        if is_answered:
            add_opening(self.markup.end, is_answered)
        return Rendered(token_ids, loss_mask)

    def _num_stop_tokens(self, ids: list[int]) -> int:
        """How much of the markup after an answer a model must learn in order to stop: up to its first control token."""
        return next((index + 1 for index, token in enumerate(ids) if token in self._control_ids), 1)

    def text_ids(self, text: str) -> list[int]:
        """A person's or an answer's text; control tokens in it are plain text."""
        return _ids(self._text_tokenizer, text, split_special_tokens=True)

    def decode(self, token_ids: Sequence[int]) -> str:
        text: str = self.tokenizer.decode(token_ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        return text


def _ids(tokenizer: Any, text: str, split_special_tokens: bool = False) -> list[int]:
    ids = tokenizer(text, add_special_tokens=False, split_special_tokens=split_special_tokens)["input_ids"]
    return [int(token) for token in ids]


def _text_tokenizer(tokenizer: Any) -> Any:
    """A copy for plain text alone: `split_special_tokens` is a state of the tokenizer, which threads would switch under us."""
    own = copy.deepcopy(tokenizer)
    added = own.added_tokens_decoder.values()
    if any(not token.special and _CONTROL_TOKEN.fullmatch(token.content) for token in added):
        state = json.loads(own.backend_tokenizer.to_str())
        for token in state["added_tokens"]:
            token["special"] = token["special"] or bool(_CONTROL_TOKEN.fullmatch(token["content"]))
        own._tokenizer = Tokenizer.from_str(json.dumps(state))
    return own


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
    texts = [users[0], answers[0], users[1], answers[1]]
    bare_opening, answer, after_answer, last_answer, end = _split(tokenizer, texts)
    # Qwen3 opens the last answer with an empty thought, earlier ones without: each answer is the last when it is given.
    if not last_answer.startswith(answer):
        raise ValueError(f"answers open with {answer!r} and then with {last_answer!r}")
    first_user = bare_opening
    if after_answer.startswith(end):  # what opens a later turn has no default system message before it
        first_user = after_answer.removeprefix(end)
        bos = tokenizer.bos_token or ""
        if bos and bare_opening.startswith(bos) and not first_user.startswith(bos):
            first_user = bos + first_user
    try:
        system, after_system, *_ = _split(tokenizer, [_SYSTEM, *texts])
    except (TemplateError, ValueError):
        system, after_system = first_user, "\n\n"
    return Markup(system, first_user, after_system, after_answer, last_answer, end)


def _split(tokenizer: Any, texts: list[str]) -> list[str]:
    """The rendered template around `texts`, of a system if odd: one piece before each, and the last after all."""
    roles = ["system"] * (len(texts) % 2) + ["user", "assistant"] * (len(texts) // 2)
    messages = [{"role": role, "content": text} for role, text in zip(roles, texts, strict=True)]
    template = _FIXED_DATE + tokenizer.get_chat_template()
    rest: str = tokenizer.apply_chat_template(messages, chat_template=template, tokenize=False)
    pieces = []
    for text in texts:
        piece, found, rest = rest.partition(text)
        if not found:
            raise ValueError(f"the template leaves out or changes a message's text ({text!r})")
        pieces.append(piece)
    return [*pieces, rest]
