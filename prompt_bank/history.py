"""Everything that happened to a domain, from the store alone: who published what, and who pointed where, when and why."""

import logging
from dataclasses import dataclass
from datetime import datetime

from prompt_bank.errors import UnknownDomainError, VersionCorruptError
from prompt_bank.manifest import Manifest
from prompt_bank.store import Store

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class HistoryEntry:
    """One line of a domain's history. `action` is a pointer change's, or `publish`."""

    at: datetime
    action: str
    version: int | None
    share: float | None
    fingerprint: str
    actor: str
    reason: str


def read_history(store: Store, domain: str) -> list[HistoryEntry]:
    """Blocking. Publications are in the manifests, of deleted versions in the record of their deletion. UnknownDomainError."""
    changes = [change for change in store.changes() if change.domain == domain]
    gone = [change.deleted for change in changes if change.deleted is not None]
    published = {manifest.version: manifest for manifest in gone}
    for number in store.versions(domain):
        try:
            published.setdefault(number, store.read_manifest(domain, number))
        except VersionCorruptError as error:
            log.warning("the history of %s lacks who published v%d: %s", domain, number, error)
    if not published and not changes:
        raise UnknownDomainError(f"no domain {domain!r} in the bank; there are: {', '.join(store.domains()) or 'none'}")
    entries = [
        HistoryEntry(change.at, change.action, change.version, change.share, change.fingerprint, change.actor, change.reason)
        for change in changes
    ]
    # Changes stand in the order they were made, whatever the clocks said; a publication before the first that follows it.
    for entry in sorted((_published(manifest) for manifest in published.values()), key=lambda entry: entry.at, reverse=True):
        is_after = (other.at >= entry.at or other.version == entry.version for other in entries)
        position = next((index for index, follows in enumerate(is_after) if follows), len(entries))
        entries.insert(position, entry)
    return entries


def _published(manifest: Manifest) -> HistoryEntry:
    fingerprint = manifest.base_model.fingerprint
    return HistoryEntry(manifest.created_at, "publish", manifest.version, None, fingerprint, manifest.actor, manifest.reason)
