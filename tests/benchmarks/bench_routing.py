"""Chooses the router's threshold and margin on validation turns and measures it on test turns.

    OMP_NUM_THREADS=1 python -m tests.benchmarks.bench_routing [folder of CLINC150]

The starters' turns and the out-of-scope sentences were written for this project; CLINC150 is measured where its folder is.
"""

import json
import statistics
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from importlib.resources import files
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from bot.routing.encoder import Encoder, Vectors
from bot.routing.router import Router, RouterSettings
from prompt_bank.card import Card, read_card
from prompt_bank.conversation import read_conversations
from prompt_bank.settings import BankSettings

STARTER = Path(str(files("prompt_bank") / "starter"))
DATA = Path(__file__).parents[1] / "data"
CLINC150 = Path(__file__).parents[2].parent / "shared" / "data" / "routing" / "clinc150"  # beside a developer's checkout
FALSE_REJECTS = (0.01, 0.02, 0.03, 0.04, 0.05)
CHOSEN_FALSE_REJECT = 0.03
MARGINS = (0.0, 0.1, 0.15, 0.2, 0.25, 0.3, 0.35, 0.4)


class Turn(NamedTuple):
    domain: str
    history: tuple[str, ...]
    text: str


class Measured(NamedTuple):
    right: float  # first turns routed to their domain
    abstained: float  # out-of-scope sentences
    stayed: float  # later turns of the starters' conversations
    followed: float  # follow_ups.jsonl
    switched: float  # another domain's first turn, in the middle of a conversation


class RememberingEncoder(Encoder):
    """Encodes a text once, however many routers ask for it."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self._known: dict[str, Vectors] = {}

    def encode(self, texts: Sequence[str]) -> Vectors:
        new = sorted({text for text in texts if text not in self._known}, key=len)
        self._known.update(zip(new, super().encode(new), strict=True))
        return np.stack([self._known[text] for text in texts]) if texts else super().encode(texts)


def measuring_encoder(models_dir: Path) -> RememberingEncoder:
    """Has read all of this project's turns already, in batches."""
    encoder = RememberingEncoder.from_models_dir(models_dir)
    said = [turn.text for split in ("validation", "test") for turn in turns(split)] + [turn.text for turn in follow_ups()]
    encoder.encode([*said, *out_of_scope("validation"), *out_of_scope("test")])
    return encoder


def starter_cards() -> dict[str, Card]:
    cards = [read_card(path) for path in sorted(STARTER.glob("*/card.toml"))]
    return {card.name: card for card in cards}


def turns(split: str) -> list[Turn]:
    """Every user turn of the starters' conversations in `split`."""
    return [
        Turn(path.parent.name, tuple(said[:index]), said[index])
        for path in sorted(STARTER.glob(f"*/{split}.jsonl"))
        for conversation in read_conversations(path)
        for said in [[message.content for message in conversation.messages if message.role == "user"]]
        for index in range(len(said))
    ]


def out_of_scope(split: str) -> list[str]:
    return [row["text"] for row in _rows(DATA / f"out_of_scope_{split}.jsonl")]


def follow_ups() -> list[Turn]:
    return [Turn(row["domain"], (row["first"],), row["follow_up"]) for row in _rows(DATA / "follow_ups.jsonl")]


def _rows(path: Path) -> Iterator[dict[str, str]]:
    return (json.loads(line) for line in path.read_text(encoding="utf-8").splitlines())


def changes(split: str) -> list[tuple[str, Turn]]:
    """Each first turn in a conversation of every other domain: (the conversation's domain, the turn)."""
    domains = list(starter_cards())
    return [(other, turn) for turn in turns(split) if not turn.history for other in domains if other != turn.domain]


def share(hits: Sequence[bool]) -> float:
    return sum(hits) / len(hits)


def measure(router: Router, split: str) -> Measured:
    said = turns(split)
    return Measured(
        right=share([router.decide(turn.text).domain == turn.domain for turn in said if not turn.history]),
        abstained=share([router.decide(text).reason == "abstained" for text in out_of_scope(split)]),
        stayed=share([_stays(router, turn) for turn in said if turn.history]),
        followed=share([_stays(router, turn) for turn in follow_ups()]),
        switched=share([router.decide(turn.text, (), current).domain == turn.domain for current, turn in changes(split)]),
    )


def _stays(router: Router, turn: Turn) -> bool:
    return router.decide(turn.text, turn.history, turn.domain).domain == turn.domain


def choose_threshold(router: Router) -> float:
    """The largest threshold, in hundredths, that rejects no more of the validation first turns than is allowed."""
    inside = sorted(router.decide(turn.text).score for turn in turns("validation") if not turn.history)
    outside = [router.decide(text).score for text in out_of_scope("validation")]
    chosen = 0.0
    print(f"\nthreshold, on {len(inside)} first turns and {len(outside)} out-of-scope sentences of validation")
    for allowed in FALSE_REJECTS:
        threshold = int(inside[int(allowed * len(inside))] * 100) / 100
        mark = ""
        if allowed == CHOSEN_FALSE_REJECT:
            chosen, mark = threshold, " <- chosen"
        rejected, abstained = (share([score < threshold for score in scores]) for scores in (inside, outside))
        print(f"  at most {allowed:.0%} false reject: {threshold:.2f}, rejects {rejected:.3f}, abstains {abstained:.3f}{mark}")
    return chosen


def choose_margin(cards: Mapping[str, Card], encoder: Encoder, settings: RouterSettings) -> float:
    """The smallest margin at which no later turn of validation leaves its domain."""
    later = [turn for turn in turns("validation") if turn.history]
    changed = changes("validation")
    chosen = None
    print(f"\nmargin, on {len(later)} later turns and {len(changed)} changes of domain of validation")
    for margin in MARGINS:
        router = Router.fit(cards, encoder, replace(settings, margin=margin))
        stayed = share([_stays(router, turn) for turn in later])
        switched = share([router.decide(turn.text, (), current).domain == turn.domain for current, turn in changed])
        mark = " <- chosen" if chosen is None and stayed == 1 else ""
        chosen = margin if mark else chosen
        print(f"  {margin:.2f}: {stayed:.3f} stay, {switched:.3f} switch{mark}")
    return MARGINS[-1] if chosen is None else chosen


def report_scores(cards: Mapping[str, Card], encoder: Encoder) -> None:
    print("\nneighbours and head weight: area under the ROC of validation first turns against out-of-scope sentences")
    for num_neighbours in (1, 3, 5):
        areas = []
        for weight in (0.0, 0.1, 0.3, 0.5, 1.0):
            router = Router.fit(cards, encoder, RouterSettings(num_neighbours=num_neighbours, head_weight=weight))
            inside = [router.decide(turn.text).score for turn in turns("validation") if not turn.history]
            outside = [router.decide(text).score for text in out_of_scope("validation")]
            areas.append(f"{weight}: {share([above > below for above in inside for below in outside]):.4f}")
        print(f"  {num_neighbours} neighbours, head weight {', '.join(areas)}")


def report_speed(cards: Mapping[str, Card], models_dir: Path) -> None:
    encoder = Encoder.from_models_dir(models_dir)
    started = time.perf_counter()
    router = Router.fit(cards, encoder)
    fitted = time.perf_counter()
    Router.fit(cards, encoder)
    refit_s, fit_s = time.perf_counter() - fitted, fitted - started
    times_ms = []
    for turn in turns("test")[:200]:
        started = time.perf_counter()
        router.decide(turn.text, turn.history, turn.domain if turn.history else None)
        times_ms.append((time.perf_counter() - started) * 1000)
    print(f"\ndecide: median {statistics.median(times_ms):.1f} ms, p95 {statistics.quantiles(times_ms, n=20)[-1]:.1f} ms")
    print(f"first fit {fit_s:.2f} s, refit {refit_s:.2f} s; torch threads: {torch.get_num_threads()}")


def report_clinc150(folder: Path, encoder: RememberingEncoder) -> None:
    """Ten domains with four examples of each of their 15 intents, threshold as shipped."""
    examples: dict[str, dict[str, list[str]]] = {}
    for row in _rows(folder / "train.jsonl"):
        if row["domain"] != "oos":
            examples.setdefault(row["domain"], {}).setdefault(row["intent"], []).append(row["text"])
    cards = {
        domain: Card(
            name=domain,
            title=domain.replace("_", " "),
            description=domain,
            brief=domain,
            examples=tuple(text for texts in intents.values() for text in texts[:4]),
        )
        for domain, intents in examples.items()
    }
    router, rows = Router.fit(cards, encoder), list(_rows(folder / "test.jsonl"))
    encoder.encode([row["text"] for row in rows])
    decisions = [(row["domain"], router.decide(row["text"]).domain) for row in rows]
    inside = [(domain, found) for domain, found in decisions if domain != "oos"]
    right, rejected = share([domain == found for domain, found in inside]), share([found is None for _, found in inside])
    abstained = share([found is None for domain, found in decisions if domain == "oos"])
    print(
        f"\nCLINC150, {len(cards)} domains: right {right:.3f}, rejected {rejected:.3f}, out of scope abstained {abstained:.3f}"
    )


def main() -> None:
    models_dir = BankSettings.load().models_dir
    encoder = measuring_encoder(models_dir)
    cards = starter_cards()
    router = Router.fit(cards, encoder)
    report_scores(cards, encoder)
    settings = RouterSettings(threshold=choose_threshold(router))
    settings = replace(settings, margin=choose_margin(cards, encoder, settings))
    print(f"\nchosen {settings}\nshipped {RouterSettings()}")
    for split in ("validation", "test"):
        print(split, {name: round(value, 3) for name, value in measure(router, split)._asdict().items()})
    report_speed(cards, models_dir)
    clinc150 = Path(sys.argv[1]) if len(sys.argv) > 1 else CLINC150
    if clinc150.is_dir():
        report_clinc150(clinc150, encoder)


if __name__ == "__main__":
    main()
