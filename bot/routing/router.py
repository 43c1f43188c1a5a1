"""Picks the domain of a turn from its text, or abstains. Fitted on the examples of the live cards; a refit is a new router.

Two questions, two numbers. *Which* domain: a logistic head over the embeddings, which knows the background sentences as one
more class. *Any at all*: the mean of the largest cosines to a domain's examples. A domain's score is their weighted sum: the
head alone is a renormalised softmax, sure of itself on texts unlike anything it has seen. On a head of ten domains or of one,
the same threshold holds (tests/benchmarks/bench_routing.py chooses it and prints the figures).

Knows nothing of the bank, of explicit choices and of the default domain: its caller makes those decisions.

Notation: E examples, H hidden size of the encoder.
"""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from sklearn.linear_model import LogisticRegression

from bot.routing.background import BACKGROUND
from bot.routing.encoder import Encoder, Vectors
from prompt_bank.card import Card

Reason = Literal["routed", "kept", "switched", "abstained", "explicit", "default", "undecided"]

# A background sentence this close to an example is about a domain of this bank.
_BACKGROUND_MAX_COSINE = 0.5
_HEAD_C = 10.0


@dataclass(frozen=True, slots=True)
class RouterSettings:
    """Threshold and margin were chosen on validation turns: at most 3% of first turns rejected, no later turn lost."""

    threshold: float = 0.47  # the least score that routes a turn without a domain, or takes one away from its domain
    margin: float = 0.3  # by how much another domain must beat the conversation's own
    num_neighbours: int = 3  # examples of a domain whose cosines are averaged
    head_weight: float = 0.3  # of the head's probability, beside the cosines' 1


@dataclass(frozen=True, slots=True)
class RoutingDecision:
    """A turn's domain, None when the router abstained; `score` is that domain's, or the best one that was not enough."""

    domain: str | None
    score: float
    scores: dict[str, float]
    reason: Reason


class Router:
    """Immutable; any thread may call it."""

    def __init__(
        self,
        encoder: Encoder,
        settings: RouterSettings,
        examples: Mapping[str, Vectors],
        head: Any | None,
    ) -> None:
        """`examples` holds each domain's [E, H]; `head` has one class for each, in that order, and perhaps the background's."""
        self._encoder = encoder
        self._settings = settings
        self._examples = examples
        self._head = head

    @classmethod
    def fit(cls, cards: Mapping[str, Card], encoder: Encoder, settings: RouterSettings | None = None) -> "Router":
        """Blocking, about a second for the first cards; the encoder remembers their examples, so a refit takes far less."""
        texts = {domain: texts_of(card) for domain, card in cards.items()}
        vectors = encoder.encode_examples([*BACKGROUND, *(text for group in texts.values() for text in group)])
        background, rest = vectors[: len(BACKGROUND)], vectors[len(BACKGROUND) :]
        ends = np.cumsum([len(group) for group in texts.values()])
        examples = dict(zip(texts, np.split(rest, ends[:-1]), strict=True)) if texts else {}
        return cls(encoder, settings or RouterSettings(), examples, _fit_head(list(examples.values()), background))

    def decide(
        self, text: str, history: Sequence[str] = (), current: str | None = None, among: Collection[str] | None = None
    ) -> RoutingDecision:
        """Blocking. `history` holds the person's earlier turns, `current` the conversation's domain if it has one.

        With `among`, only these domains are chosen and told of. The others still count as something else, so that a question
        for one of them abstains instead of going to the least wrong one.
        """
        scores = self._scores(text, among)
        if current in scores:
            return self._keep_or_switch(scores, current)
        if history and self._best(scores)[1] < self._settings.threshold:
            # "the app keeps crashing", a clarifying question, "since the update": only together do they say enough.
            joined = self._scores(f"{history[-1]}\n{text}", among)
            scores = max(scores, joined, key=lambda either: self._best(either)[1])
        best, score = self._best(scores)
        if score < self._settings.threshold:
            return RoutingDecision(None, score, scores, "abstained")
        return RoutingDecision(best, score, scores, "routed")

    def _keep_or_switch(self, scores: dict[str, float], current: str) -> RoutingDecision:
        best, score = self._best(scores)
        beaten = score - scores[current] >= self._settings.margin
        if best != current and beaten and score >= self._settings.threshold:
            return RoutingDecision(best, score, scores, "switched")
        return RoutingDecision(current, scores[current], scores, "kept")

    def _scores(self, text: str, among: Collection[str] | None) -> dict[str, float]:
        scores = self._all_scores(text)
        return scores if among is None else {domain: score for domain, score in scores.items() if domain in among}

    def _all_scores(self, text: str) -> dict[str, float]:
        vector = self._encoder.encode([text])  # [1, H]
        cosines = [
            _mean_of_largest(examples @ vector[0], self._settings.num_neighbours) for examples in self._examples.values()
        ]
        if self._head is None:
            return dict(zip(self._examples, cosines, strict=True))
        probabilities = self._head.predict_proba(vector)[0, : len(cosines)]
        weight = self._settings.head_weight
        return {
            domain: cosine + weight * float(probability)
            for domain, cosine, probability in zip(self._examples, cosines, probabilities, strict=True)
        }

    @staticmethod
    def _best(scores: dict[str, float]) -> tuple[str | None, float]:
        """A bank without domains has no best one, and a score that never suffices."""
        return max(scores.items(), key=lambda item: item[1], default=(None, 0.0))


def texts_of(card: Card) -> list[str]:
    """The title too: it is what people answer when they are asked which domain they mean."""
    return list(dict.fromkeys((card.title, *card.examples, *card.suggested_prompts)))


def _fit_head(examples: list[Vectors], background: Vectors) -> Any | None:
    """A classifier over domains and background; None when there is nothing to tell apart."""
    if not examples:
        return None
    known = np.concatenate(examples)
    strange = background[(background @ known.T).max(axis=1) < _BACKGROUND_MAX_COSINE]
    classes = [*examples, strange] if len(strange) else examples
    if len(classes) < 2:
        return None
    labels = np.repeat(np.arange(len(classes)), [len(group) for group in classes])
    return LogisticRegression(C=_HEAD_C, max_iter=1000).fit(np.concatenate(classes), labels)


def _mean_of_largest(cosines: Vectors, num_largest: int) -> float:
    """`cosines`: [E]."""
    return float(np.sort(cosines)[-num_largest:].mean())
