"""Adding and editing a domain by its card: either way a new version, so that rolling back undoes it."""

from prompt_bank.bank import Bank
from prompt_bank.card import Card
from prompt_bank.version import Draft, ServedModel, Version


async def add_card(bank: Bank, card: Card, model: ServedModel, actor: str, reason: str, keep_prompt: bool = True) -> Version:
    """Publishes and promotes a version with this card.

    The soft prompt of the live version stays, with the record of its training, unless `keep_prompt` is false; a domain
    without one is served from the card's brief.
    """
    live = (await bank.claim_table()).pointers(card.name, model.fingerprint).live
    parent = None if live is None else await bank.version(card.name, live)
    if parent is not None and parent.digest is not None and keep_prompt:
        draft = Draft(card, model, await bank.soft_prompt(parent, model), parent.manifest.training, parent=live)
    else:
        draft = Draft(card, model, parent=live)
    version = await bank.publish(draft, actor, reason)
    await bank.promote(card.name, version.manifest.version, actor, reason, live, model)
    return version
