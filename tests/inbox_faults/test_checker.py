"""The checker finds what is altered: each fault that the other tests look for, made by hand."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from prompt_bank.conversation import Message
from tests.inbox_faults.checker import Answered, Asked, check, check_heard

ASKED = [Asked(f"m{number}", f"c{number % 2}", "why? " * (number + 1)) for number in range(6)]


def num_words(messages: Sequence[Message], version: int | None) -> int:
    return sum(len(message.content.split()) for message in messages)


def all_answered() -> list[Answered]:
    turns: list[Answered] = []
    for one in ASKED:
        before = [turn for turn in turns if turn.conversation == one.conversation]
        num_tokens = sum(len(f"{turn.question} {turn.answer}".split()) for turn in before) + len(one.text.split())
        turns.append(Answered(one.id, one.conversation, one.text, "so it is", "stop", num_tokens))
    return turns


def test_what_is_right_passes() -> None:
    assert check(ASKED, all_answered(), num_words) == []


def test_a_lost_message_is_found_and_that_its_successors_did_not_know_it() -> None:
    first, *others = all_answered()
    problems = check(ASKED, others, num_words)
    assert problems[0] == "message m0 was lost"
    assert [problem.split(":")[0] for problem in problems[1:]] == ["turn of m2", "turn of m4"]
    assert check(ASKED, [first, *others], num_words) == []


def test_a_message_that_was_answered_twice_is_found() -> None:
    turns = all_answered()
    assert "message m5 was answered 2 times" in check(ASKED, [*turns, turns[-1]], num_words)


def test_a_turn_that_nobody_asked_for_is_found() -> None:
    turns = all_answered()
    assert check(ASKED, [*turns, replace(turns[-1], message_id="m9", conversation="c9")], num_words) == [
        "message m9 was never acknowledged"
    ]


def test_turns_in_another_order_are_found() -> None:
    turns = all_answered()
    swapped = [turns[2], turns[1], turns[0], *turns[3:]]
    assert "conversation c0 was answered in the order ['m2', 'm0', 'm4'], asked in the order ['m0', 'm2', 'm4']" in check(
        ASKED, swapped, num_words
    )


def test_a_turn_that_was_cut_short_is_found() -> None:
    *turns, last = all_answered()
    assert check(ASKED, [*turns, replace(last, finish_reason="cancelled")], num_words) == ["turn of m5: it ended as cancelled"]


def test_a_turn_that_did_not_know_its_predecessor_is_found() -> None:
    *turns, last = all_answered()
    altered = replace(last, num_prompt_tokens=last.num_prompt_tokens - 6)
    (problem,) = check(ASKED, [*turns, altered], num_words)
    assert problem.startswith("turn of m5: it was given 12 tokens, its predecessors make 18")


def test_a_turn_that_answers_another_message_is_found() -> None:
    *turns, last = all_answered()
    problems = check(ASKED, [*turns, replace(last, question=ASKED[0].text)], num_words)
    assert problems[0] == f"turn of m5: it answers {ASKED[0].text!r}"


def heard(*texts: str, answer: str = "so it is") -> list[dict[str, Any]]:
    deltas = [{"type": "turn.delta", "text": text} for text in texts]
    return [{"type": "turn.started"}, *deltas, {"type": "turn.completed", "turn": {"answer": answer}}]


def test_a_follower_s_answer_counts_from_its_last_start() -> None:
    turn = all_answered()[0]
    assert check_heard(heard("so ", "it is"), turn) == []
    assert check_heard([*heard("so it was")[:-1], *heard("so ", "it is")], turn) == []


def test_a_follower_who_missed_or_heard_twice_is_found() -> None:
    turn = all_answered()[0]
    for events in (heard("so "), heard("so ", "so ", "it is"), heard("it is", "so ")):
        (problem,) = check_heard(events, turn)
        assert "streamed" in problem
    (problem,) = check_heard(heard("so it is", answer="so it was"), turn)
    assert "told at the end" in problem
    assert check_heard(heard("so ", "it is")[:-1], turn) == [
        "message m0: a follower was told ['turn.started', 'turn.delta', 'turn.delta']"
    ]
