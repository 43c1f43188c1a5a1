"""Two versions of a domain compared: what they are made of, their vectors, and what they answer, as served but greedy."""

import asyncio
import difflib
from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor
from torch.nn.functional import cosine_similarity

from bot.answering import Answer, Answerer, Overrides
from bot.engine.torch_engine import TorchEngine
from bot.inspection.report import sample_questions
from bot.inspection.vectors import pooled, prefix_kv_of, similarity
from bot.settings import Settings
from prompt_bank.base_model import BaseModel
from prompt_bank.conversation import Message
from prompt_bank.model_files import Report
from prompt_bank.opening import LoadedModel, open_bank
from prompt_bank.soft_prompt import SoftPrompt
from prompt_bank.version import Version


@dataclass(frozen=True, slots=True)
class VectorDiff:
    """`similarity` is that of the pooled prefix KV, for any two prompts.

    For each virtual token, where kind and P are the same: the cosine of a and b, and ||a - b|| / ||a||.
    """

    similarity: float
    cosines: list[float]
    distances: list[float]


@dataclass(frozen=True, slots=True)
class AnswerDiff:
    question: str
    a: str
    b: str


@dataclass(frozen=True, slots=True)
class VersionDiff:
    """`facts` are those of a and of b; `card` is a unified diff; `vectors` is None where either is served by its brief."""

    facts: dict[str, tuple[str, str]]
    card: list[str]
    vectors: VectorDiff | None
    answers: list[AnswerDiff]

    def summary(self) -> list[str]:
        """What to read first."""
        num_same = sum(row.a == row.b for row in self.answers)
        lines = [f"{num_same} of {len(self.answers)} greedy answers are the same."]
        if self.vectors is None:
            lines.append("There are no vectors to compare: at least one of the two is served by its brief.")
        else:
            lines.append(f"Similarity of the pooled prompts: {self.vectors.similarity:.3f}.")
            if self.vectors.cosines:
                num = len(self.vectors.cosines)
                lines[-1] += (
                    f" Per virtual token, mean cosine {sum(self.vectors.cosines) / num:.3f} and mean relative distance "
                    f"{sum(self.vectors.distances) / num:.3f}."
                )
        lines.append("The cards differ." if self.card else "The cards are the same.")
        return lines


async def diff_versions(
    settings: Settings, loaded: LoadedModel, a: Version, b: Version, max_tokens: int | None, report: Report
) -> VersionDiff:
    """Raises BankError when a version was made for another model. All answers are decoded in one batch."""
    questions = list(dict.fromkeys([*sample_questions(a.card), *sample_questions(b.card)]))
    asked = [(version, question) for question in questions for version in (a, b)]
    engine = TorchEngine(
        loaded.base, num_rows=len(asked), max_waiting=len(asked), context_tokens=settings.context_tokens, drain_s=0
    )
    async with open_bank(settings) as bank, engine:
        report("vectors")
        prompts = [await bank.soft_prompt(version, loaded.served) for version in (a, b) if version.digest]
        vectors = await asyncio.to_thread(_diff_vectors, loaded.base, *prompts) if len(prompts) == 2 else None
        answerer = Answerer(bank, engine, loaded.served, loaded.chat_format, loaded.base.stop_token_ids)
        texts = await _answers(answerer, asked, max_tokens, report)
    facts_of_a, facts_of_b = _facts(a), _facts(b)
    card_of_a, card_of_b = (version.card.to_toml().splitlines() for version in (a, b))
    return VersionDiff(
        facts={name: (fact, facts_of_b[name]) for name, fact in facts_of_a.items()},
        card=list(difflib.unified_diff(card_of_a, card_of_b, a.name, b.name, lineterm="")),
        vectors=vectors,
        answers=[AnswerDiff(*row) for row in zip(questions, texts[::2], texts[1::2], strict=True)],
    )


def _facts(version: Version) -> dict[str, str]:
    manifest = version.manifest
    prompt, training = manifest.soft_prompt, manifest.training
    return {
        "created": f"{manifest.created_at:%Y-%m-%d %H:%M}",
        "parent": f"v{manifest.parent}" if manifest.parent else "none",
        "base model": manifest.base_model.name,
        "kind": prompt.kind if prompt else "brief",
        "virtual tokens": str(prompt.num_virtual_tokens) if prompt else "none",
        "bytes": f"{prompt.num_bytes:,}" if prompt else "none",
        "digest": prompt.digest if prompt else "none",
        "training data": training.data_digest if training else "none",
    }


def _diff_vectors(base: BaseModel, a: SoftPrompt, b: SoftPrompt) -> VectorDiff:
    alike = similarity(pooled(prefix_kv_of(base, a)), [pooled(prefix_kv_of(base, b))])[0]
    if (a.kind, a.num_virtual_tokens) != (b.kind, b.num_virtual_tokens):
        return VectorDiff(alike, [], [])
    before, after = a.by_token, b.by_token
    distances = (after - before).norm(dim=1) / before.norm(dim=1)
    return VectorDiff(alike, _rounded(cosine_similarity(before, after)), _rounded(distances))


def _rounded(values: Tensor) -> list[float]:
    return [round(value, 4) for value in values.tolist()]


async def _answers(
    answerer: Answerer, asked: Sequence[tuple[Version, str]], max_tokens: int | None, report: Report
) -> list[str]:
    overrides = Overrides(temperature=0.0, max_tokens=max_tokens)
    num_done = 0

    async def answer(version: Version, question: str) -> str:
        nonlocal num_done
        known = Answer()
        async for _ in answerer.generate(version, [Message(role="user", content=question)], overrides, [known]):
            pass
        num_done += 1
        report(f"answers: {num_done} of {len(asked)}")
        return known.text

    report(f"answers: 0 of {len(asked)}")
    try:
        async with asyncio.TaskGroup() as group:
            tasks = [group.create_task(answer(version, question)) for version, question in asked]
    except ExceptionGroup as errors:
        raise errors.exceptions[0] from errors  # the command line knows its errors one by one
    return [task.result() for task in tasks]
