"""Every error Frontdesk raises on purpose. Two audiences: `str(error)` is for the operator's log, `sentence` for the person.

FrontdeskError
├── BadRequestError                what the person or caller sent cannot be answered
│   ├── EmptyMessageError
│   ├── MessageTooLongError
│   ├── UnknownDomainError
│   ├── UnknownTurnError
│   ├── UnknownConversationError
│   ├── ConversationBusyError
│   ├── RequestUnderWayError
│   ├── IdempotencyMismatchError
│   ├── BodyTooLargeError
│   ├── BodyTooDeepError
│   ├── HeadTooLargeError
│   └── RequestTooSlowError
├── AccessError                    who asks may not have this, or not now
│   ├── AuthenticationError
│   ├── PermissionDeniedError
│   └── RateLimitedError
├── ApiKeyError                    an API key cannot be made or found
├── BadFileError                   a file an operator gave cannot be used: names file and row
│   ├── CardError
│   ├── ConversationFileError
│   └── ArchiveError
├── ModelError                     the base model or the router's encoder cannot be had
│   ├── ModelNotFoundError
│   ├── ModelFetchError
│   ├── ModelCorruptError
│   ├── ModelNotServedError
│   └── DiskFullError
├── BankError                      a version cannot be stored, found or served
│   ├── UnknownVersionError
│   ├── VersionCorruptError
│   ├── BaseModelMismatchError
│   ├── ChatFormatMismatchError
│   ├── SoftPromptError
│   ├── VersionInUseError
│   ├── PointerConflictError
│   └── HubError
├── UnavailableError               a resource this service needs is away or full: try again
│   ├── RedisUnavailableError
│   ├── EngineBusyError
│   ├── InboxFullError
│   ├── LogUnavailableError
│   ├── FencedError
│   ├── EngineStoppedError
│   ├── EngineFailedError
│   └── TooManyRequestsError
├── TrainingError                  a run ended without a version
└── ServiceError                   the service could not be started or reached
"""

from collections.abc import Iterable
from typing import Self


class FrontdeskError(Exception):
    """Something Frontdesk refused or could not do."""

    sentence = "Sorry, something went wrong on our side. Please try again in a moment."


class BadRequestError(FrontdeskError):
    """What was sent cannot be answered."""

    sentence = "Sorry, I could not read that message."


class EmptyMessageError(BadRequestError):
    """A message without any text."""

    sentence = "Your message was empty. Please type your question."


class MessageTooLongError(BadRequestError):
    """One message alone does not fit the context."""

    sentence = "Your message is too long for me. Please send a shorter one."


class UnknownDomainError(BadRequestError):
    """A domain that is not in the bank was asked for."""

    sentence = "There is no such domain here."

    @classmethod
    def not_live(cls, domain: str, live: Iterable[str]) -> Self:
        return cls(f"no domain {domain!r} is live; there are: {', '.join(sorted(live)) or 'none'}")


class UnknownTurnError(BadRequestError):
    """Feedback was given on a turn that is not logged."""

    sentence = "I no longer know that answer."


class UnknownConversationError(BadRequestError):
    """There is no such conversation, or it is another caller's."""

    sentence = "I no longer know that conversation."


class ConversationBusyError(BadRequestError):
    """A turn of this conversation is under way, and one is answered at a time."""

    sentence = "I am still answering your last message."


class RequestUnderWayError(BadRequestError):
    """The first request with this idempotency key is under way."""

    sentence = "I am still working on that."


class IdempotencyMismatchError(BadRequestError):
    """An idempotency key came back with another request."""


class BodyTooLargeError(BadRequestError):
    """A request's body has more bytes than are taken."""

    sentence = "Your message is too long for me. Please send a shorter one."


class BodyTooDeepError(BadRequestError):
    """A request's JSON is nested deeper than is taken."""


class HeadTooLargeError(BadRequestError):
    """A request's headers have more bytes than are taken."""


class RequestTooSlowError(BadRequestError):
    """A request's headers or body took longer to come than is waited."""


class AccessError(FrontdeskError):
    """Who asks may not have this, or not now."""

    sentence = "Sorry, you are not allowed to do that."


class AuthenticationError(AccessError):
    """No API key was given, or none that counts."""

    sentence = "Sorry, I do not know who you are."


class PermissionDeniedError(AccessError):
    """The API key's role or domains do not include this."""


class RateLimitedError(AccessError):
    """The API key, or a person it speaks for, asks for more than it may."""

    sentence = "Sorry, that was too much at once. Please try again in a moment."

    def __init__(self, text: str, retry_after_s: int = 1) -> None:
        super().__init__(text)
        self.retry_after_s = retry_after_s


class ApiKeyError(FrontdeskError):
    """An API key cannot be made or found."""


class BadFileError(FrontdeskError):
    """A file an operator gave cannot be used."""


class CardError(BadFileError):
    """A domain card is malformed."""


class ConversationFileError(BadFileError):
    """A JSONL file of conversations is malformed; the text names file and row."""


class ArchiveError(BadFileError):
    """An exported version, folder or archive, is not whole or holds what it should not; or it cannot be written."""


class ModelError(FrontdeskError):
    """A model's files cannot be used."""


class ModelNotFoundError(ModelError):
    """No embedded model, folder or hub model has this name."""


class ModelFetchError(ModelError):
    """The model's files could not be downloaded."""


class ModelCorruptError(ModelError):
    """The model's files are truncated or are not what they should be."""


class ModelNotServedError(ModelError):
    """The engine cannot run this architecture as it runs by itself."""


class DiskFullError(ModelError):
    """Too little disk space for the model's files."""


class BankError(FrontdeskError):
    """A version cannot be stored, found or served."""

    sentence = "Sorry, this topic is not available right now. Please try again later."


class UnknownVersionError(BankError):
    """The bank holds no such version."""


class VersionCorruptError(BankError):
    """A version's files are not those its manifest names."""


class BaseModelMismatchError(BankError):
    """The soft prompt was made for another base model."""


class ChatFormatMismatchError(BankError):
    """The soft prompt was made for another chat format."""


class SoftPromptError(BankError):
    """A soft prompt's tensor has the wrong kind, shape, dtype or values."""


class VersionInUseError(BankError):
    """What a version is in use as, or retired from, forbids the change."""


class PointerConflictError(BankError):
    """The pointer table changed under a writer; nothing was written."""


class HubError(BankError):
    """A soft prompt could not be had from the hub."""


class UnavailableError(FrontdeskError):
    """A resource is away or full for now."""

    sentence = "Sorry, I am very busy right now. Please try again in a moment."


class RedisUnavailableError(UnavailableError):
    """Redis does not answer."""

    sentence = "Sorry, I cannot answer right now. Please try again in a moment."


class EngineBusyError(UnavailableError):
    """The engine's queue is full."""


class InboxFullError(UnavailableError):
    """So many messages wait already, in all or in one conversation, that one more is not taken."""


class LogUnavailableError(UnavailableError):
    """The conversation log cannot be read or written."""

    sentence = "Sorry, I cannot answer right now. Please try again in a moment."


class FencedError(UnavailableError):
    """The conversation was claimed by another worker, which answers now; nothing was written."""


class EngineStoppedError(UnavailableError):
    """The engine has been stopped or its thread has died."""

    sentence = "Sorry, I cannot answer right now. Please try again in a moment."


class EngineFailedError(UnavailableError):
    """The step that worked on this request failed; the engine goes on with others."""

    sentence = "Sorry, something went wrong on our side. Please try again in a moment."


class TooManyRequestsError(UnavailableError):
    """As many requests are open as may be."""


class TrainingError(FrontdeskError):
    """A training run ended without a version."""


class ServiceError(FrontdeskError):
    """The service could not be started or reached."""


def error_named(name: str) -> type[FrontdeskError]:
    """The class of an error of which the log or an event kept the name."""
    found = globals().get(name)
    return found if isinstance(found, type) and issubclass(found, FrontdeskError) else FrontdeskError
