"""What the training commands need of an installation: its base model, the card a domain is live with, and its bank.

The bank is opened before training, to find the card, and again after it, to publish: training takes minutes, and a service
that shares the bank may come and go meanwhile.
"""

from dataclasses import dataclass

from prompt_bank.actor import actor
from prompt_bank.base_model import BaseModel
from prompt_bank.chat_format import ChatFormat
from prompt_bank.opening import load_model, open_bank
from prompt_bank.settings import BankSettings
from prompt_bank.starter import install_starters
from prompt_bank.version import Draft, ServedModel, Version
from trainers.runs import TrainedDomain


@dataclass(frozen=True, slots=True)
class Workbench:
    """The frozen model of an installation, and what versions made for it are marked with."""

    settings: BankSettings
    base: BaseModel
    chat_format: ChatFormat
    served: ServedModel

    @classmethod
    def open(cls, settings: BankSettings) -> "Workbench":
        """Raises ModelError."""
        loaded = load_model(settings)
        return cls(settings, loaded.base, loaded.chat_format, loaded.served)


async def live_version(bench: Workbench, domain: str) -> Version:
    """The version whose card and place the trained one takes. Raises UnknownDomainError."""
    async with open_bank(bench.settings) as bank:
        await install_starters(bank, bench.served)
        return await bank.live(domain, bench.served)


async def publish(bench: Workbench, parent: Version, trained: TrainedDomain, promote: bool) -> Version:
    draft = Draft(parent.card, bench.served, trained.prompt, trained.record, parent.manifest.version)
    async with open_bank(bench.settings) as bank:
        reason = f"trained on {trained.record.num_conversations} conversations"
        version = await bank.publish(draft, actor(), reason)
        if promote:
            # A card edited while this was trained must not be undone by it.
            await bank.promote(
                parent.card.name, version.manifest.version, actor(), reason, parent.manifest.version, bench.served
            )
    return version
