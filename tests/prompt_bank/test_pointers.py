"""The pointer table as pure values: what each change does, what is refused, and that no sequence of changes breaks it."""

import math
import shutil
import tempfile
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
from hypothesis import Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from prompt_bank.errors import FrontdeskError, UnknownDomainError, UnknownVersionError, VersionInUseError
from prompt_bank.manifest import BaseModelRecord, Manifest
from prompt_bank.pointers import Action, Canary, DomainPointers, PointerChange, PointerTable, is_in_canary
from prompt_bank.store import FolderStore

FINGERPRINT = "f"
OTHER = "g"

Step = tuple[Action, int | None] | tuple[Action, int | None, str]


def a_change(
    action: Action, version: int | None = None, fingerprint: str = FINGERPRINT, domain: str = "banking", **more: Any
) -> PointerChange:
    share = {"share": 0.25} if action == "canary" else {}
    values = {"domain": domain, "fingerprint": fingerprint, "actor": "ann", "reason": "test"}
    return PointerChange(action=action, version=version, **(values | share | more))


def table_after(*steps: Step) -> PointerTable:
    """Each step is checked, as a store does it."""
    table = PointerTable()
    for step in steps:
        change = a_change(*step)
        table.check(change)
        table = table.with_change(change)
    return table


def pointers_after(*steps: Step, fingerprint: str = FINGERPRINT) -> DomainPointers:
    return table_after(*steps).pointers("banking", fingerprint)


TWO_LIVE: tuple[Step, ...] = (("promote", 1), ("promote", 2))
IMPLYING: tuple[Action, ...] = ("rollback", "end_canary", "end_shadow")
ALL_USES: tuple[Step, ...] = (*TWO_LIVE, ("canary", 3), ("shadow", 4))


@pytest.mark.parametrize(
    ("steps", "expected"),
    [
        ((("promote", 1),), DomainPointers(live=1)),
        (TWO_LIVE, DomainPointers(live=2, previous=(1,))),
        ((*TWO_LIVE, ("promote", 2)), DomainPointers(live=2, previous=(1,))),
        ((*TWO_LIVE, ("rollback", None)), DomainPointers(live=1)),
        (
            ALL_USES,
            DomainPointers(live=2, canary=Canary(version=3, share=0.25), shadow=4, previous=(1,)),
        ),
        ((*ALL_USES, ("canary", 4)), DomainPointers(live=2, canary=Canary(version=4, share=0.25), shadow=4, previous=(1,))),
        ((*ALL_USES, ("end_canary", None)), DomainPointers(live=2, shadow=4, previous=(1,))),
        (
            (*ALL_USES, ("end_shadow", None)),
            DomainPointers(live=2, canary=Canary(version=3, share=0.25), previous=(1,)),
        ),
        ((*ALL_USES, ("promote", 3)), DomainPointers(live=3, shadow=4, previous=(1, 2))),
        (
            (*ALL_USES, ("promote", 4)),
            DomainPointers(live=4, canary=Canary(version=3, share=0.25), previous=(1, 2)),
        ),
        ((*ALL_USES, ("canary", 1), ("rollback", None)), DomainPointers(live=1, shadow=4)),
        ((*ALL_USES, ("shadow", 1), ("rollback", None)), DomainPointers(live=1, canary=Canary(version=3, share=0.25))),
        ((*ALL_USES, ("retire", 2)), DomainPointers(previous=(1,))),
        ((*ALL_USES, ("retire", 3)), DomainPointers(live=2, shadow=4, previous=(1,))),
        (
            (*ALL_USES, ("retire", 4)),
            DomainPointers(live=2, canary=Canary(version=3, share=0.25), previous=(1,)),
        ),
        ((*TWO_LIVE, ("retire", 1)), DomainPointers(live=2)),
        ((*TWO_LIVE, ("delete", 1)), DomainPointers(live=2)),
        ((*TWO_LIVE, ("retire", 2), ("rollback", None)), DomainPointers(live=1)),
        ((*TWO_LIVE, ("retire", 2), ("promote", 3), ("rollback", None)), DomainPointers(live=1)),
        ((*TWO_LIVE, ("retire", 1), ("restore", 1)), DomainPointers(live=2)),
    ],
    ids=lambda value: " ".join(f"{step[0]}{step[1] or ''}" for step in value) if isinstance(value, tuple) else "",
)
def test_what_a_change_does(steps: tuple[Step, ...], expected: DomainPointers) -> None:
    assert pointers_after(*steps) == expected


def test_rollback_goes_back_through_the_promotions() -> None:
    steps: list[Step] = [("promote", number) for number in (1, 2, 3, 1)]
    lives = []
    for _ in range(3):
        steps.append(("rollback", None))
        lives.append(pointers_after(*steps).live)
    assert lives == [3, 2, 1]


@pytest.mark.parametrize(
    "steps",
    [
        (("promote", 1), ("promote", 2), ("promote", 1), ("retire", 2)),
        (("promote", 1), ("promote", 2), ("promote", 1), ("delete", 2)),
        (("promote", 1), ("promote", 2), ("retire", 2), ("promote", 1)),
    ],
    ids=["between retired", "between deleted", "promoted after its successor was retired"],
)
def test_rollback_never_leads_to_the_version_that_is_live(steps: tuple[Step, ...]) -> None:
    """Nothing else was ever live that still may be: there is nothing to go back to, and that is said."""
    with pytest.raises(UnknownVersionError, match="no previous live version"):
        table_after(*steps).check(a_change("rollback"))


def test_twenty_previous_live_versions_are_kept() -> None:
    steps: list[Step] = [("promote", number) for number in range(1, 31)]
    assert pointers_after(*steps).previous == tuple(range(10, 30))


def test_retired_and_deleted_versions_are_recorded_for_every_base_model() -> None:
    table = table_after(("promote", 1), ("promote", 5, OTHER), ("retire", 5, OTHER), ("delete", 2))
    record = table.record("banking")
    assert (record.retired, record.deleted) == ((5,), (2,))
    assert table.pointers("banking", OTHER).live is None
    assert table.pointers("banking", FINGERPRINT).live == 1
    restored = table.with_change(a_change("restore", 5))
    assert restored.record("banking").retired == ()
    deleted = table.with_change(a_change("delete", 5))
    assert (deleted.record("banking").retired, deleted.record("banking").deleted) == ((), (2, 5))


def test_base_models_and_domains_keep_apart() -> None:
    table = table_after(("promote", 1), ("promote", 2, OTHER)).with_change(a_change("promote", 7, domain="loans"))
    assert table.live_versions(FINGERPRINT) == {"banking": 1, "loans": 7}
    assert table.live_versions(OTHER) == {"banking": 2}
    assert table.live_versions("h") == {}
    assert table.pointers("travel", FINGERPRINT) == DomainPointers()


def test_change_is_recorded_with_the_version_that_the_domain_alone_says() -> None:
    table = table_after(*ALL_USES)
    implied = {action: table.resolved(a_change(action)).version for action in IMPLYING}
    assert implied == {"rollback": 1, "end_canary": 3, "end_shadow": 4}
    promotion = a_change("promote", 7)
    assert table.resolved(promotion) == promotion
    for action in IMPLYING:
        assert PointerTable().resolved(a_change(action)).version is None


def test_uses_are_named() -> None:
    table = table_after(*ALL_USES, ("promote", 5, OTHER), ("canary", 3, OTHER))
    assert table.pointers("banking", FINGERPRINT).uses() == {2: "live", 3: "canary", 4: "shadow"}
    assert table.uses_of("banking", 3) == {FINGERPRINT: "canary", OTHER: "canary"}
    assert table.uses_of("banking", 1) == {}
    assert set(table.versions_in_use()) == {("banking", number) for number in (2, 3, 4, 5)}
    both = table.with_change(a_change("shadow", 3)).pointers("banking", FINGERPRINT)
    assert both.uses() == {2: "live", 3: "canary"}


NO_LIVE = "banking has no live version for this base model; promote one first"


@pytest.mark.parametrize(
    ("steps", "change", "error", "text"),
    [
        ((("delete", 1),), a_change("promote", 1), UnknownVersionError, "v1 was deleted; publish it again as a new version"),
        (
            (("retire", 1),),
            a_change("promote", 1),
            VersionInUseError,
            "v1 is retired; `frontdesk bank restore banking 1` first",
        ),
        ((), a_change("canary", 1), UnknownDomainError, NO_LIVE),
        ((), a_change("shadow", 1), UnknownDomainError, NO_LIVE),
        ((("promote", 5, OTHER),), a_change("canary", 1), UnknownDomainError, NO_LIVE),
        (
            TWO_LIVE,
            a_change("canary", 2),
            VersionInUseError,
            "v2 is the live version; a canary is another one that is compared with it",
        ),
        (
            TWO_LIVE,
            a_change("shadow", 2),
            VersionInUseError,
            "v2 is the live version; a shadow is another one that is compared with it",
        ),
        ((*TWO_LIVE, ("delete", 3)), a_change("canary", 3), UnknownVersionError, "v3 was deleted; publish it again"),
        ((*TWO_LIVE, ("delete", 3)), a_change("shadow", 3), UnknownVersionError, "v3 was deleted; publish it again"),
        ((*TWO_LIVE, ("retire", 3)), a_change("canary", 3), VersionInUseError, "v3 is retired; `frontdesk bank restore"),
        ((*TWO_LIVE, ("retire", 3)), a_change("shadow", 3), VersionInUseError, "v3 is retired; `frontdesk bank restore"),
        (
            (("promote", 1),),
            a_change("rollback"),
            UnknownVersionError,
            "banking has no previous live version to go back to (v1 is live); promote one",
        ),
        (
            (("promote", 1), ("retire", 1)),
            a_change("rollback"),
            UnknownVersionError,
            "banking has no previous live version to go back to (none is live); promote one",
        ),
        (TWO_LIVE, a_change("rollback", fingerprint=OTHER), UnknownVersionError, "no previous live version"),
        (TWO_LIVE, a_change("end_canary"), UnknownVersionError, "banking has no canary version; nothing to end"),
        (TWO_LIVE, a_change("end_shadow"), UnknownVersionError, "banking has no shadow version; nothing to end"),
        ((*TWO_LIVE, ("shadow", 3)), a_change("end_canary"), UnknownVersionError, "no canary version"),
        ((*TWO_LIVE, ("canary", 3)), a_change("end_shadow"), UnknownVersionError, "no shadow version"),
        ((("retire", 1),), a_change("retire", 1), UnknownVersionError, "banking v1 is retired or deleted already"),
        ((("delete", 1),), a_change("retire", 1), UnknownVersionError, "banking v1 is retired or deleted already"),
        (TWO_LIVE, a_change("restore", 1), UnknownVersionError, "banking v1 is not retired; nothing to restore"),
        (
            (("retire", 1), ("delete", 1)),
            a_change("restore", 1),
            UnknownVersionError,
            "banking v1 is not retired; nothing to restore",
        ),
        ((("delete", 1),), a_change("delete", 1), UnknownVersionError, "banking v1 was deleted already"),
        (
            ALL_USES,
            a_change("delete", 2),
            VersionInUseError,
            "v2 is the live version and cannot be deleted; promote another or retire it first",
        ),
        (
            ALL_USES,
            a_change("delete", 3),
            VersionInUseError,
            "v3 is the canary version and cannot be deleted; end the canary first",
        ),
        (
            ALL_USES,
            a_change("delete", 4),
            VersionInUseError,
            "v4 is the shadow version and cannot be deleted; end the shadow first",
        ),
        (
            (("promote", 5, OTHER),),
            a_change("delete", 5),
            VersionInUseError,
            "v5 is the live version and cannot be deleted",
        ),
    ],
)
def test_what_is_refused(steps: tuple[Step, ...], change: PointerChange, error: type[FrontdeskError], text: str) -> None:
    table = table_after(*steps)
    with pytest.raises(error) as refused:
        table.check(change)
    assert type(refused.value) is error
    assert text in str(refused.value)
    assert "banking" in str(refused.value)


@pytest.mark.parametrize("share", [0, -0.1, 1.01, math.nan, math.inf])
def test_share_is_more_than_none_and_at_most_all(share: float) -> None:
    with pytest.raises(ValueError, match="share"):
        a_change("canary", 1, share=share)


def test_json_round_trip() -> None:
    manifest = Manifest(
        domain="banking",
        version=6,
        actor="bob",
        reason="a trial",
        base_model=BaseModelRecord(name="tiny", fingerprint=FINGERPRINT),
        chat_format="c",
        card_sha256="d",
    )
    change = a_change("delete", 6, deleted=manifest, at=datetime(2026, 1, 2, 3, 4, 5, 678901, tzinfo=UTC))
    table = table_after(*ALL_USES, ("retire", 1), ("promote", 5, OTHER)).with_change(change)
    for excluded in (True, False):  # stores and Redis leave out what is None
        assert PointerTable.model_validate_json(table.model_dump_json(exclude_none=excluded)) == table
        assert PointerChange.model_validate_json(change.model_dump_json(exclude_none=excluded)) == change


# Any sequence of changes, on a real store, against a model that is as plain as can be.

VERSIONS = {1: FINGERPRINT, 2: FINGERPRINT, 3: FINGERPRINT, 4: FINGERPRINT, 5: OTHER, 6: OTHER}  # of domain "banking"
VERSION = st.sampled_from(sorted(VERSIONS))
MODEL = st.sampled_from([FINGERPRINT, OTHER])
_FIRST = 58  # changes made before, so that a sequence crosses an epoch at which the store writes a table


class Expected:
    """One base model's pointers, in lists."""

    def __init__(self) -> None:
        self.live: int | None = None
        self.canary: tuple[int, float] | None = None
        self.shadow: int | None = None
        self.earlier: list[int] = []

    def set_live(self, version: int | None) -> None:
        self.live = version
        if self.canary and self.canary[0] == version:
            self.canary = None
        if self.shadow == version:
            self.shadow = None
        self.tidy()

    def drop(self, version: int) -> None:
        self.earlier = [number for number in self.earlier if number != version]
        if self.canary and self.canary[0] == version:
            self.canary = None
        if self.shadow == version:
            self.shadow = None
        if self.live == version:
            self.live = None
        self.tidy()

    def tidy(self) -> None:
        """A rollback always changes the live version: neither it nor any other follows itself."""
        after = [*self.earlier, self.live][1:]
        self.earlier = [number for number, following in zip(self.earlier, after, strict=True) if number != following][-20:]


class PointerMachine(RuleBasedStateMachine):
    def __init__(self) -> None:
        super().__init__()
        self.root = Path(tempfile.mkdtemp())
        self.models = {FINGERPRINT: Expected(), OTHER: Expected()}
        self.retired: set[int] = set()
        self.deleted: set[int] = set()
        self.num_changes = 0

    @initialize(has_past=st.booleans())
    def open_store(self, has_past: bool) -> None:
        self.store = FolderStore(self.root)
        for epoch in range(1, _FIRST + 1 if has_past else 1):
            change = a_change("promote", epoch, domain="loans")
            (self.root / "changes" / f"{epoch:012}.json").write_text(change.model_dump_json())
            self.num_changes += 1

    def commit(self, change: PointerChange, is_allowed: bool) -> bool:
        if not is_allowed:
            with pytest.raises(FrontdeskError):
                self.store.commit(change, self.num_changes + 1)
            return False
        self.num_changes += 1
        committed = self.store.commit(change, self.num_changes)
        assert committed.change == change
        assert committed == self.store.pointer_table()
        return True

    def is_servable(self, version: int) -> bool:
        return version not in self.retired | self.deleted

    @rule(version=VERSION)
    def promote(self, version: int) -> None:
        model = self.models[VERSIONS[version]]
        if self.commit(a_change("promote", version, VERSIONS[version]), self.is_servable(version)) and model.live != version:
            if model.live is not None:
                model.earlier.append(model.live)
            model.set_live(version)

    @rule(fingerprint=MODEL)
    def rollback(self, fingerprint: str) -> None:
        model = self.models[fingerprint]
        if self.commit(a_change("rollback", None, fingerprint), bool(model.earlier)):
            before = model.live
            model.set_live(model.earlier.pop())
            assert model.live != before

    @rule(version=VERSION, share=st.sampled_from([0.1, 0.5, 1.0]))
    def canary(self, version: int, share: float) -> None:
        model = self.models[VERSIONS[version]]
        is_allowed = self.is_servable(version) and model.live not in (None, version)
        if self.commit(a_change("canary", version, VERSIONS[version], share=share), is_allowed):
            model.canary = (version, share)

    @rule(version=VERSION)
    def shadow(self, version: int) -> None:
        model = self.models[VERSIONS[version]]
        is_allowed = self.is_servable(version) and model.live not in (None, version)
        if self.commit(a_change("shadow", version, VERSIONS[version]), is_allowed):
            model.shadow = version

    @rule(fingerprint=MODEL)
    def end_canary(self, fingerprint: str) -> None:
        model = self.models[fingerprint]
        if self.commit(a_change("end_canary", None, fingerprint), model.canary is not None):
            model.canary = None

    @rule(fingerprint=MODEL)
    def end_shadow(self, fingerprint: str) -> None:
        model = self.models[fingerprint]
        if self.commit(a_change("end_shadow", None, fingerprint), model.shadow is not None):
            model.shadow = None

    @rule(version=VERSION)
    def retire(self, version: int) -> None:
        if self.commit(a_change("retire", version, VERSIONS[version]), self.is_servable(version)):
            self.retired.add(version)
            self.models[VERSIONS[version]].drop(version)

    @precondition(lambda self: self.retired)
    @rule(version=VERSION)
    def restore(self, version: int) -> None:
        if self.commit(a_change("restore", version, VERSIONS[version]), version in self.retired):
            self.retired.remove(version)

    @rule(version=VERSION)
    def delete(self, version: int) -> None:
        model = self.models[VERSIONS[version]]
        in_use = {model.live, model.shadow, model.canary[0] if model.canary else None}
        if self.commit(a_change("delete", version, VERSIONS[version]), version not in self.deleted | in_use):
            self.retired.discard(version)
            self.deleted.add(version)
            model.drop(version)

    @rule()
    def reopen(self) -> None:
        self.store = FolderStore(self.root)

    @rule()
    def lose_the_tables(self) -> None:
        shutil.rmtree(self.root / "tables")
        self.store = FolderStore(self.root)

    @rule(content=st.sampled_from([b"", b"{", b"[]", b"\xff"]))
    def corrupt_the_tables(self, content: bytes) -> None:
        for path in (self.root / "tables").iterdir():
            path.write_bytes(content)
        self.store = FolderStore(self.root)

    @invariant()
    def is_as_expected(self) -> None:
        if not hasattr(self, "store"):
            return
        table = self.store.pointer_table()
        assert table.epoch == self.num_changes
        record = table.record("banking")
        assert (set(record.retired), set(record.deleted)) == (self.retired, self.deleted)
        for fingerprint, expected in self.models.items():
            pointers = table.pointers("banking", fingerprint)
            canary = pointers.canary
            assert (pointers.live, pointers.shadow) == (expected.live, expected.shadow)
            assert (canary and (canary.version, canary.share)) == expected.canary
            assert pointers.previous == tuple(expected.earlier)
            pointed_at = {*pointers.uses(), *pointers.previous}
            assert not pointed_at & (self.retired | self.deleted)
            assert pointers.live is None or pointers.live not in (canary and canary.version, pointers.shadow)

    def teardown(self) -> None:
        if hasattr(self, "store"):
            folded = PointerTable()
            for change in self.store.changes():
                folded = folded.with_change(change)
            assert folded == self.store.pointer_table() == FolderStore(self.root).pointer_table()
        shutil.rmtree(self.root)


TestPointerMachine = PointerMachine.TestCase
TestPointerMachine.settings = settings(
    max_examples=40, stateful_step_count=40, phases=(Phase.explicit, Phase.generate, Phase.shrink)
)


# Who is in a canary.

IDS = [f"slack:T1:C1:{n}.000{n % 7}" for n in range(10_000)]


@pytest.mark.parametrize("share", [0.01, 0.1, 0.5, 0.9])
def test_canary_answers_its_share(share: float) -> None:
    count = sum(is_in_canary(id_, "d" * 64, share) for id_ in IDS)
    deviation = math.sqrt(len(IDS) * share * (1 - share))
    assert abs(count - share * len(IDS)) < 4 * deviation


def test_canary_of_all_answers_all() -> None:
    assert all(is_in_canary(id_, "d" * 64, 1.0) for id_ in IDS)


def test_raising_the_share_keeps_the_members() -> None:
    members: set[str] = set()
    for share in (0.001, 0.05, 0.1, 0.5, 1.0):
        now = {id_ for id_ in IDS if is_in_canary(id_, "d" * 64, share)}
        assert members < now
        members = now


def test_another_candidate_draws_anew() -> None:
    first, second = ({id_ for id_ in IDS if is_in_canary(id_, candidate, 0.2)} for candidate in ("d" * 64, "e" * 64))
    # Of two independent draws of a fifth, a twenty-fifth is in both.
    assert abs(len(first & second) - 0.04 * len(IDS)) < 4 * math.sqrt(len(IDS) * 0.04 * 0.96)


def test_membership_is_the_same_in_every_process_and_release() -> None:
    """Pinned: a service that is updated must not move conversations between versions."""
    assert [n for n in range(40) if is_in_canary(f"conversation-{n}", "d" * 64, 0.2)] == [7, 9, 11, 15, 17, 36]
