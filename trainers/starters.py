"""Trains the shipped domains from nothing and measures them: `trained/`, a version folder, and `results.json` beside it.

chrF is taken where there is one right answer, in translation; other domains are judged by loss, accuracy and a few answers
side by side. Earlier turns of a test conversation are those of the file, whatever the model would have said.
"""

import json
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from prompt_bank.card import Card, read_card
from prompt_bank.conversation import Conversation, Message
from prompt_bank.soft_prompt import SoftPrompt
from prompt_bank.starter import TRAINED
from prompt_bank.version import Draft, write_version
from trainers.dataset import read_dataset, spoken_messages
from trainers.evaluate import chrf
from trainers.publishing import Workbench
from trainers.runs import TrainedDomain, max_conversation_tokens, train_domain
from trainers.serving_layout import greedy_answers
from trainers.settings import TuningSettings
from trainers.tuning import Progress

RESULTS_FILE = "results.json"
CHRF_DOMAINS = ("translation",)
NUM_SAMPLES = 8
# About 500 tokens a step in each.
BATCH_SIZES = {"banking": 4, "healthcare": 4, "translation": 8}
_NUM_TOGETHER = 16


@dataclass(frozen=True, slots=True)
class HeldOutTurn:
    """A person's message with what came before it, and the answer in the file."""

    messages: list[Message]
    reference: str


def train_starter(bench: Workbench, folder: Path, settings: TuningSettings, progress: Progress) -> TrainedDomain:
    """Trains the domain in `folder` and replaces its trained version and its results."""
    card = read_card(folder / "card.toml")
    max_tokens = max_conversation_tokens(bench.base, settings)
    train, validation, test = (folder / f"{part}.jsonl" for part in ("train", "validation", "test"))
    dataset = read_dataset(train, validation, test, bench.chat_format, max_tokens, settings.seed)
    trained = train_domain(bench.base, bench.chat_format, card, dataset, settings, progress)
    target = folder / TRAINED
    if target.exists():
        shutil.rmtree(target)
    target.mkdir()
    draft = Draft(card, bench.served, trained.prompt, trained.record)
    write_version(draft, 1, target, "frontdesk", "trained by `frontdesk train-starters`")
    results = {
        "base_model": bench.base.name,
        "num_held_out": len(dataset.test),
        "held_out": trained.record.metrics,
        **generated(bench, card, dataset.test, trained.prompt),
    }
    (folder / RESULTS_FILE).write_text(json.dumps(results, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    return trained


def generated(bench: Workbench, card: Card, conversations: Sequence[Conversation], prompt: SoftPrompt) -> dict[str, Any]:
    """What is answered by the frozen model, with the brief, and with the prompt: samples, and chrF where it is taken."""
    turns = held_out_turns(conversations)
    sampled = turns[:: max(1, len(turns) // NUM_SAMPLES)][:NUM_SAMPLES]
    takes_chrf = card.name in CHRF_DOMAINS
    asked = turns if takes_chrf else sampled
    brief = [Message(role="system", content=card.brief)]
    plain = [turn.messages for turn in asked]
    answers = {
        "frozen": _answers(bench, plain, None),
        "brief": _answers(bench, [brief + messages for messages in plain], None),
        "trained": _answers(bench, plain, prompt),
    }
    samples = [
        {
            "messages": [message.model_dump(include={"role", "content"}) for message in turn.messages],
            "reference": turn.reference,
            **{setup: texts[asked.index(turn)] for setup, texts in answers.items()},
        }
        for turn in sampled
    ]
    if not takes_chrf:
        return {"samples": samples}
    references = [turn.reference for turn in asked]
    return {"chrf": {setup: round(chrf(texts, references), 1) for setup, texts in answers.items()}, "samples": samples}


def held_out_turns(conversations: Sequence[Conversation]) -> list[HeldOutTurn]:
    turns = []
    for conversation in conversations:
        spoken = spoken_messages(conversation)
        turns += [HeldOutTurn(spoken[:index], spoken[index].content) for index in range(1, len(spoken), 2)]
    return turns


def _answers(bench: Workbench, asked: Sequence[Sequence[Message]], prompt: SoftPrompt | None) -> list[str]:
    num_virtual = prompt.num_virtual_tokens if prompt else 0
    texts = [bench.chat_format.render(messages, bench.base.context_tokens - num_virtual).token_ids for messages in asked]
    answers: list[list[int]] = []
    for start in range(0, len(texts), _NUM_TOGETHER):
        answers += greedy_answers(bench.base, prompt, texts[start : start + _NUM_TOGETHER])
    return [bench.chat_format.decode(answer).strip() for answer in answers]
