"""What the sandbox refuses.

MethodError        a method of the Web API answers `ok: false`; never leaves the server
└── RateLimitedError   with status 429
ActionError        a person tried what Slack would not let them do: a mistake of the test or of the caller
DeliveryError      a request or an envelope was not acknowledged; leads to redelivery
"""


class MethodError(Exception):
    """A method refuses; `code` is Slack's word for it, `messages` say what is wrong with which argument."""

    def __init__(self, code: str, *messages: str, **fields: str) -> None:
        super().__init__(code)
        self.code = code
        self.messages = messages
        self.fields = fields


class RateLimitedError(MethodError):
    """Too many calls; another counts after so many seconds."""

    def __init__(self, retry_after_s: int) -> None:
        super().__init__("ratelimited")
        self.retry_after_s = retry_after_s


class ActionError(Exception):
    """A person cannot do this: no such button, view or command, or not in this channel."""


class DeliveryError(Exception):
    """What was sent to the app was not acknowledged; `reason` is what Slack tells with the next attempt."""

    def __init__(self, reason: str, status: int | None = None, may_retry: bool = True) -> None:
        super().__init__(reason)
        self.reason = reason
        self.status = status
        self.may_retry = may_retry
