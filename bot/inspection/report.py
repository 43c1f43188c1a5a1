"""One version looked into: everything that is shown of it, as plain values for terminal, page and JSON alike."""

import logging
from dataclasses import dataclass

from bot.inspection.attention import Attention, measure_attention
from bot.inspection.vectors import NearestWords, nearest_words, pooled, prefix_kv_of, similarity
from prompt_bank.card import Card
from prompt_bank.conversation import Message
from prompt_bank.errors import BankError
from prompt_bank.model_files import Report
from prompt_bank.opening import LoadedModel
from prompt_bank.soft_prompt import Kind, SoftPrompt
from prompt_bank.store import Store
from prompt_bank.version import Version

log = logging.getLogger(__name__)

_NUM_QUESTIONS = 4
_MAX_IN_MATRIX = 16


@dataclass(frozen=True, slots=True)
class VirtualToken:
    """`drift` is None where training recorded none."""

    norm: float
    drift: float | None
    attention: float


@dataclass(frozen=True, slots=True)
class Similarity:
    """`matrix` [N][N] holds the cosines of `domains` [N]: the inspected one, then the live others, most alike first."""

    domains: list[str]
    matrix: list[list[float]]

    @property
    def others(self) -> list[tuple[str, float]]:
        return list(zip(self.domains, self.matrix[0], strict=True))[1:]


@dataclass(frozen=True, slots=True)
class PromptReport:
    kind: Kind
    num_bytes: int
    digest: str
    tokens: list[VirtualToken]
    nearest: list[NearestWords]
    attention: Attention
    similarity: Similarity


@dataclass(frozen=True, slots=True)
class Inspection:
    """`prompt` is None for a version that is served by its brief."""

    domain: str
    version: int
    title: str
    description: str
    base_model: str
    brief: str
    num_brief_tokens: int
    questions: list[str]
    prompt: PromptReport | None

    def facts(self) -> dict[str, str]:
        facts = {"base model": self.base_model, "brief": f"{self.num_brief_tokens} tokens"}
        if self.prompt is None:
            return facts | {"kind": "brief", "description": self.description}
        return facts | {
            "kind": self.prompt.kind,
            "virtual tokens": str(len(self.prompt.tokens)),
            "bytes": f"{self.prompt.num_bytes:,}",
            "digest": self.prompt.digest,
        }

    def summary(self) -> list[str]:
        """What to read first."""
        if self.prompt is None:
            return [
                f"{self.domain} v{self.version} has no soft prompt: it is served by its brief, "
                f"{self.num_brief_tokens} tokens before every conversation."
            ]
        return _summary(self.prompt, len(self.questions))


def sample_questions(card: Card) -> list[str]:
    """What people are suggested to ask, filled up with the router's examples."""
    return list(dict.fromkeys([*card.suggested_prompts, *card.examples]))[:_NUM_QUESTIONS]


def inspect(store: Store, loaded: LoadedModel, version: Version, report: Report) -> Inspection:
    """Looks into `version`, telling `report` what it does. Raises BankError when it was made for another model."""
    card = version.card
    prompt = store.read_soft_prompt(version, loaded.served) if version.digest else None
    return Inspection(
        domain=card.name,
        version=version.manifest.version,
        title=card.title,
        description=card.description,
        base_model=version.manifest.base_model.name,
        brief=card.brief,
        num_brief_tokens=len(loaded.chat_format.text_ids(card.brief)),
        questions=sample_questions(card),
        prompt=_inspect_prompt(store, loaded, version, prompt, report) if prompt else None,
    )


def _inspect_prompt(store: Store, loaded: LoadedModel, version: Version, prompt: SoftPrompt, report: Report) -> PromptReport:
    base, training = loaded.base, version.manifest.training
    prefix_kv = prefix_kv_of(base, prompt)
    report("attention on sample turns")
    context_tokens = base.context_tokens - prompt.num_virtual_tokens
    asked = [[Message(role="user", content=question)] for question in sample_questions(version.card)]
    texts = [loaded.chat_format.render(messages, context_tokens).token_ids for messages in asked]
    attention = measure_attention(base, prefix_kv, texts)
    report("nearest words")
    nearest = nearest_words(base, prompt, prefix_kv)
    report("other domains")
    others = {version.card.name: pooled(prefix_kv)}
    for domain, number in store.pointer_table().live_versions(base.fingerprint).items():
        if domain != version.card.name and (other := _live_prompt(store, loaded, domain, number)):
            others[domain] = pooled(prefix_kv_of(base, other))
    cosines = dict(zip(others, similarity(pooled(prefix_kv), list(others.values())), strict=True))
    domains = [version.card.name, *sorted(list(others)[1:], key=lambda domain: -cosines[domain])][:_MAX_IN_MATRIX]
    drift = training.drift if training else ()
    norms, shares = prompt.by_token.norm(dim=1).tolist(), attention.by_token
    vectors = [others[domain] for domain in domains]
    return PromptReport(
        kind=prompt.kind,
        num_bytes=prompt.num_bytes,
        digest=prompt.digest,
        tokens=[
            VirtualToken(
                norm=round(norms[index], 4),
                drift=drift[index] if index < len(drift) else None,
                attention=shares[index],
            )
            for index in range(prompt.num_virtual_tokens)
        ],
        nearest=nearest,
        attention=attention,
        similarity=Similarity(domains, [similarity(one, vectors) for one in vectors]),
    )


def _live_prompt(store: Store, loaded: LoadedModel, domain: str, number: int) -> SoftPrompt | None:
    """None for a version that has none, or that cannot be read: this one can be looked into all the same."""
    try:
        version = store.read_version(domain, number)
        return store.read_soft_prompt(version, loaded.served) if version.digest else None
    except BankError as error:
        log.warning("%s is left out: %s", domain, error)
        return None


def _summary(prompt: PromptReport, num_turns: int) -> list[str]:
    attention, tokens = prompt.attention, prompt.tokens
    strongest = sorted(range(len(tokens)), key=lambda index: -tokens[index].attention)[:3]
    listed = ", ".join(f"{index} ({tokens[index].attention:.1%})" for index in strongest)
    lines = [
        f"{len(tokens)} virtual tokens receive {attention.share:.0%} of the text's attention on {num_turns} sample turns; "
        f"spread evenly it would be {attention.even_share:.0%}.",
        f"Most of it goes to virtual tokens {listed}.",
    ]
    drifts = [token.drift for token in tokens if token.drift is not None]
    if drifts:
        mean = sum(drifts) / len(drifts)
        lines.append(f"Training moved them by {mean:.0%} of their length ({min(drifts):.0%} to {max(drifts):.0%}).")
    else:
        lines.append("How far training moved them is not recorded.")
    if others := prompt.similarity.others:
        lines.append("Most alike: " + ", ".join(f"{domain} ({cosine:.2f})" for domain, cosine in others[:3]) + ".")
    else:
        lines.append("No other live domain has a soft prompt to compare with.")
    return lines
