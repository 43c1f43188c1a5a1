"""What is told of a turn while its conversation is held by the server, as JSON values: the same over every channel and process.

`turn.started` comes again when another process had to begin anew: what was streamed before it is void then.
"""

from typing import Any

from bot.conversations.records import LoggedTurn
from bot.turn import TurnStarted
from prompt_bank.errors import FrontdeskError, error_named

DELTA = "turn.delta"
ENDS = ("turn.completed", "turn.cancelled", "turn.failed")


def started(message_id: str, event: TurnStarted) -> dict[str, Any]:
    version, decision = event.version, event.decision
    return {
        "type": "turn.started",
        "message_id": message_id,
        "turn_id": event.turn_id,
        "domain": decision.domain,
        "version": version.manifest.version if version else None,
        "digest": version.digest if version else None,
        "disclaimer": version.card.disclaimer if version else "",
        "routing": {"reason": decision.reason, "score": decision.score, "scores": decision.scores},
    }


def delta(message_id: str, text: str) -> dict[str, Any]:
    return {"type": DELTA, "message_id": message_id, "text": text}


def ended(turn: LoggedTurn) -> dict[str, Any]:
    """How a logged turn ended, whoever logged it."""
    assert turn.message_id is not None
    if turn.finish_reason == "error":
        code = turn.error or FrontdeskError.__name__
        return failed(turn.message_id, code, error_named(code).sentence)
    kind = "turn.cancelled" if turn.finish_reason == "cancelled" else "turn.completed"
    return {"type": kind, "message_id": turn.message_id, "turn": described(turn)}


def failed(message_id: str, code: str, sentence: str) -> dict[str, Any]:
    return {"type": "turn.failed", "message_id": message_id, "error": {"code": code, "message": sentence}}


def described(turn: LoggedTurn) -> dict[str, Any]:
    """A turn for the person it was with."""
    return {
        "id": turn.id,
        "message_id": turn.message_id,
        "conversation_id": turn.conversation_id,
        "question": turn.question,
        "answer": turn.answer,
        "author": turn.author,
        "domain": turn.domain,
        "version": turn.version,
        "digest": turn.digest,
        "finish_reason": turn.finish_reason,
        "error": turn.error,
        "routing": {"reason": turn.routing_reason, "score": turn.routing_score, "scores": turn.routing_scores},
        "usage": {
            "prompt_tokens": turn.num_prompt_tokens,
            "completion_tokens": len(turn.token_ids),
            "total_tokens": turn.num_prompt_tokens + len(turn.token_ids),
        },
        "queue_ms": turn.queue_ms,
        "first_token_ms": turn.first_token_ms,
        "total_ms": turn.total_ms,
    }
