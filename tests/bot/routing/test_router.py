"""Routing with the real encoder and the starters' cards: the promised figures, and what a bank can do to a router."""

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from bot.routing.encoder import Encoder
from bot.routing.router import Router, RouterSettings
from prompt_bank.card import Card
from tests.benchmarks.bench_routing import RememberingEncoder, measure, measuring_encoder, starter_cards

TRAVEL = Card(
    name="travel",
    title="Travel",
    description="Answers questions about trips.",
    brief="You are a travel agent.",
    examples=(
        "Find me a cheap flight to Lisbon",
        "Which hotel near the beach has a pool?",
        "How much luggage may I take on the plane?",
        "What should I see on a weekend in Vienna?",
        "Is there a night train to Venice?",
        "Do I need a visa to visit Japan?",
    ),
)


@pytest.fixture(scope="module")
def encoder(models_dir: Path) -> RememberingEncoder:
    return measuring_encoder(models_dir)


@pytest.fixture(scope="module")
def router(encoder: RememberingEncoder) -> Router:
    return Router.fit(starter_cards(), encoder)


def test_the_promised_figures_hold_on_test_data(router: Router) -> None:
    measured = measure(router, "test")
    assert measured.right >= 0.90
    assert measured.abstained >= 0.70
    assert measured.stayed >= 0.95
    assert measured.followed >= 0.95
    assert measured.switched >= 0.75  # no promise, but a router that never lets go would pass all of the above


@pytest.mark.parametrize("text", ["hi", "Hello!", "Good morning", "can you help me?", "thanks, bye", "Bonjour", "你好"])
def test_greetings_abstain(router: Router, text: str) -> None:
    decision = router.decide(text)
    assert (decision.domain, decision.reason) == (None, "abstained")
    assert decision.score == max(decision.scores.values()) < RouterSettings().threshold


def test_a_decision_carries_every_domains_score(router: Router) -> None:
    decision = router.decide("How do I unblock my debit card?")
    assert (decision.domain, decision.reason) == ("banking", "routed")
    assert set(decision.scores) == set(starter_cards())
    assert decision.score == decision.scores["banking"] == max(decision.scores.values())


@pytest.mark.parametrize("payload", ["my card was stolen", "I have had a fever since yesterday", "what is my balance?"])
def test_a_request_to_translate_goes_to_translation_whatever_it_is_about(router: Router, payload: str) -> None:
    assert router.decide(f"Translate into French: {payload}").domain == "translation"


@pytest.mark.parametrize(("text", "domain"), [("Banking", "banking"), ("health", "healthcare"), ("Translation", "translation")])
def test_the_answer_to_a_clarifying_question_is_understood(router: Router, text: str, domain: str) -> None:
    assert router.decide(text, ["can you help me?"]).domain == domain


@pytest.mark.parametrize("current", ["banking", "healthcare", "translation"])
def test_an_answer_that_names_no_domain_stays(router: Router, current: str) -> None:
    decision = router.decide("yes please, the second one", ["an earlier question"], current)
    assert (decision.domain, decision.reason) == (current, "kept")
    assert decision.score == decision.scores[current]


def test_a_clear_change_switches(router: Router) -> None:
    decision = router.decide("Actually, translate into French: where is the station?", ["I lost my card"], "banking")
    assert (decision.domain, decision.reason) == ("translation", "switched")


def test_a_larger_margin_keeps_what_a_smaller_one_lets_go(encoder: RememberingEncoder) -> None:
    firm = Router.fit(starter_cards(), encoder, RouterSettings(margin=2.0))
    decision = firm.decide("Actually, translate into French: where is the station?", ["I lost my card"], "banking")
    assert (decision.domain, decision.reason) == ("banking", "kept")


def test_a_conversation_whose_domain_was_withdrawn_is_routed_anew(router: Router) -> None:
    decision = router.decide("I have a headache", ["a flight to Rome"], "travel")
    assert (decision.domain, decision.reason) == ("healthcare", "routed")


def test_a_bank_of_one_domain_still_abstains(encoder: RememberingEncoder) -> None:
    alone = Router.fit({"banking": starter_cards()["banking"]}, encoder)
    assert alone.decide("How do I unblock my debit card?").domain == "banking"
    assert alone.decide("hello").domain is None
    assert alone.decide("My knee is swollen after skiing").domain is None


def test_a_bank_without_domains_abstains(encoder: RememberingEncoder) -> None:
    decision = Router.fit({}, encoder).decide("hello", ["hi"], "banking")
    assert (decision.domain, decision.score, decision.scores, decision.reason) == (None, 0.0, {}, "abstained")


def test_a_fourth_domain_is_routed_to_once_its_card_is_there(router: Router, encoder: RememberingEncoder) -> None:
    text = "I am looking for a hotel in Vienna with a pool"
    assert router.decide(text).domain is None
    larger = Router.fit({**starter_cards(), "travel": TRAVEL}, encoder)
    assert larger.decide(text).domain == "travel"
    assert larger.decide("How do I unblock my debit card?").domain == "banking"
    assert larger.decide("hello").domain is None


@pytest.mark.parametrize(
    "text", ["", " \n\t", "\x00\x07\x1b[2J", "a" * 200_000, "word " * 50_000, "\ud83d", "\u202e\u200b", "🙂" * 500]
)
def test_no_text_breaks_it(router: Router, text: str) -> None:
    assert router.decide(text).reason == "abstained"
    assert router.decide(text, ["I lost my card"], "banking").reason == "kept"


def test_two_fits_decide_alike(router: Router, encoder: RememberingEncoder) -> None:
    assert Router.fit(starter_cards(), encoder).decide("My card is gone") == router.decide("My card is gone")


def test_threads_get_the_decisions_of_one_thread(models_dir: Path) -> None:
    shared = Router.fit(starter_cards(), Encoder.from_models_dir(models_dir))
    texts = [*starter_cards()["banking"].suggested_prompts, *starter_cards()["translation"].suggested_prompts, "hi"] * 3
    expected = [shared.decide(text) for text in texts]
    with ThreadPoolExecutor(4) as pool:
        assert list(pool.map(shared.decide, texts)) == expected
