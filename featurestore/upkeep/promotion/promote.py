"""Promotion: a channel moves to the snapshot of another one when the gates between them hold; each decision is kept.

channels/<to>/decisions/00000000000000000003.json    the third decision about a channel: what each gate found
"""

import time
import uuid
from collections.abc import Sequence
from typing import Annotated

from pydantic import Field

from featurestore import log
from featurestore.keys import Int64Array
from featurestore.log import CHANNELS, versions
from featurestore.published.channels import check_channel_name, last_move, last_number
from featurestore.published.numbered import append_numbered
from featurestore.spec import LAST_SECOND, OptionalId, RandomId, Sealed, Version, read_sealed
from featurestore.storage.storage import Storage
from featurestore.store import FeatureStore
from featurestore.upkeep.promotion import gates
from featurestore.upkeep.promotion.gates import Gate, GateLimits, GateResult
from featurestore.upkeep.promotion.moving import move_channel

DECISIONS = "decisions"


class Decision(Sealed):
    """What the gates said about moving channel `target` to where `source` pointed; `number` is 0 until it is kept."""

    number: Annotated[int, Field(ge=0)]
    source: str
    target: str
    version: Version  # of the candidate
    commit_id: OptionalId
    before: Version | None  # where `target` pointed; None where it was not there
    results: tuple[GateResult, ...]
    forced: str | None  # why it moves whatever the gates say
    writer: str
    time_s: Annotated[float, Field(ge=0, le=LAST_SECOND)]
    nonce: RandomId

    @property
    def holds(self) -> bool:
        """Whether every gate holds."""
        return all(result.holds for result in self.results)

    @property
    def moves(self) -> bool:
        """Whether the channel moves."""
        return self.holds or self.forced is not None

    @property
    def is_there(self) -> bool:
        """Whether the channel pointed there already: nothing was measured."""
        return self.before == self.version


def promote(
    store: FeatureStore,
    source: str,
    target: str,
    limits: GateLimits,
    *,
    keys: Int64Array | None = None,
    more: Sequence[Gate] = (),
    dry_run: bool = False,
    force: str | None = None,
) -> Decision:
    """Move channel `target` to the snapshot of channel `source` if the gates hold, or with `force`, which is a reason.

    `keys` are those that have to have a row; without them, those of `target`'s snapshot. `more` are gates of the
    caller, such as a canary evaluation. Each decision is kept with the channel, but for a dry run. Where `target`
    points there already, nothing is measured or kept. Raises ChannelError, CommitConflictError where another writer
    moved `target` meanwhile: then it stays where that one put it.
    """
    check_channel_name(target)
    storage = store.storage
    seen = last_number(storage, target)
    found = last_move(storage, target) if seen else None
    candidate = store.snapshot(source)
    before = None if found is None or found.version is None else found.version
    is_there = found is not None and found.commit_id == candidate.manifest.commit_id
    stable = None if before is None or is_there else store.snapshot(before)
    results: list[GateResult] = []
    if not is_there:
        results = [
            gates.coverage(candidate, stable, keys, limits),
            gates.quarantine(store, candidate, limits),
            gates.drift(candidate, stable, limits),
            gates.neighbours(candidate, stable, limits),
            *(gate(candidate, stable) for gate in more),
        ]

    def decision(number: int) -> Decision:
        return Decision(
            number=number,
            source=source,
            target=target,
            version=candidate.version,
            commit_id=candidate.manifest.commit_id,
            before=before,
            results=tuple(results),
            forced=force,
            writer=log.writer_name(),
            time_s=time.time(),
            nonce=uuid.uuid4().hex,
        )

    if dry_run or is_there:
        return decision(0)
    kept = append_numbered(storage, _folder(target), decision)
    if kept.moves:
        why = f"promoted from {source}" if kept.holds else f"forced: {force}"
        move_channel(store, target, candidate.version, f"{why} (decision {kept.number})", after=seen)
    return kept


def read_decisions(storage: Storage, target: str) -> list[Decision]:
    """Read the decisions about a channel, the first one first. Raises CorruptFileError."""
    folder = _folder(target)
    numbers = versions(storage, folder)
    return [read_sealed(storage, log.manifest_path(number, folder), Decision) for number in numbers]


def lines(decision: Decision, dry_run: bool) -> list[str]:
    """Write what a command prints after the table of gates."""
    target, version = decision.target, decision.version
    stays = "is not there, and is not made" if decision.before is None else f"stays at snapshot {decision.before}"
    if decision.is_there:
        return [f"{target} points to snapshot {version} already: nothing to do"]
    if not decision.moves:
        return [f"{target} {stays}"]
    would = "would point" if dry_run else "points"
    kept = "" if dry_run else f", decision {decision.number}"
    forced = "" if decision.holds else f" by --force, though gates fail: {decision.forced}"
    return [f"{target} {would} to snapshot {version}{forced}{kept}"]


def failures(decision: Decision) -> list[str]:
    """Write one line for each gate that fails: its name, value and limit, and what the value is of."""
    found = []
    for result in decision.results:
        if not result.holds:
            value = "not measured" if result.value is None else f"{result.value:.4g}"
            found.append(f"gate {result.gate}: {value}, limit {result.limit:g}: {result.text}")
    return found


def _folder(target: str) -> str:
    return f"{CHANNELS}/{check_channel_name(target)}/{DECISIONS}"
