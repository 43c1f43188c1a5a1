"""The shipped domains. Each folder holds a card, the project's own conversations, and a version trained on them."""

import logging
from pathlib import Path

from prompt_bank.bank import Bank
from prompt_bank.card import Card, read_card
from prompt_bank.editing import add_card
from prompt_bank.errors import FrontdeskError
from prompt_bank.pointers import PointerTable
from prompt_bank.version import MANIFEST_FILE, Draft, ServedModel, check_served_model, read_soft_prompt, read_version

log = logging.getLogger(__name__)

STARTER_DIR = Path(__file__).parent
TRAINED = "trained"


def starter_domains() -> list[str]:
    return sorted(path.parent.name for path in STARTER_DIR.glob("*/card.toml"))


async def install_starters(bank: Bank, model: ServedModel) -> None:
    """Gives every starter domain, and every domain live on another base model, a live version for `model`.

    An operator's own card goes before the shipped one.
    A trained version made for another model is not served: its domain answers from the card's brief until it is trained.
    """
    if any(await _missing(bank, model)):
        async with bank.alone("starters"):  # a service that starts at the same time would publish each a second time
            domains, cards = await _missing(bank, model)
            for domain in domains:
                version = await bank.publish(_starter_draft(domain, model), "frontdesk", "starter domain")
                await bank.promote(domain, version.manifest.version, "frontdesk", "starter domain", served=model)
            for card in cards:
                await add_card(bank, card, model, "frontdesk", f"first start with base model {model.name}")


async def _missing(bank: Bank, model: ServedModel) -> tuple[list[str], list[Card]]:
    """The starter domains, and the operator's cards, that have no live version for `model` yet and should."""
    table = await bank.claim_table()
    live = _live_on_any_model(table)
    # A domain that is live nowhere was taken offline on purpose; one with pointers for this model is known here.
    known = {domain for domain, record in table.domains.items() if domain not in live or model.fingerprint in record.by_model}
    elsewhere = {domain: number for domain, number in live.items() if domain not in known}
    cards = await bank.cards(elsewhere)
    starters = [
        domain
        for domain in starter_domains()
        if domain not in known and cards.get(domain, _starter_card(domain)) == _starter_card(domain)
    ]
    return starters, [card for domain, card in cards.items() if domain not in starters]


def _live_on_any_model(table: PointerTable) -> dict[str, int]:
    """Domain to its newest version that is live for some base model."""
    live = {
        domain: [pointers.live for pointers in record.by_model.values() if pointers.live is not None]
        for domain, record in table.domains.items()
    }
    return {domain: max(numbers) for domain, numbers in live.items() if numbers}


def _starter_card(domain: str) -> Card:
    return read_card(STARTER_DIR / domain / "card.toml")


def _starter_draft(domain: str, model: ServedModel) -> Draft:
    card = _starter_card(domain)
    trained = STARTER_DIR / domain / TRAINED
    if not (trained / MANIFEST_FILE).is_file():
        return Draft(card, model)
    version = read_version(trained)
    try:
        check_served_model(version, model)
    except FrontdeskError as error:
        log.warning("%s: serving its brief instead", error)
        return Draft(card, model)
    return Draft(card, model, read_soft_prompt(trained, version, model), version.manifest.training)
