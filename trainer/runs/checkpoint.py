"""Checkpoints: content, fingerprint of the run, accepted stores, and the one to resume or warm-start from.

step-00000050/
      state.json                         position, seed, what data, model and store they belong to, digest of each file
      dense.safetensors                  rank 0: what is the same on every rank: parameters, their Adam state, counts
      rows-00000-of-00002.safetensors    one per rank: its ID rows and their optimiser's state, by table and shard

Where these files lie, and how they become a checkpoint together: `trainer.runs.saving`. That a checkpoint is damaged
shows when it is loaded, as each of its files is read then and compared with its digest.

A warm start is a new run that begins with an earlier one. The paper's partial warm-up takes everything but the ID
vectors, which start fresh: taking them too overfits ("Image Matters", arXiv 1711.06505: GAUC .6260 without, .6283
partial, .6230 full). Optimisers and the learning rate's schedule start fresh: Adam's moments are running means of the
earlier run's gradients, at the end of its schedule and on its data, and a new run's first steps would be made of them.
But a run of the next day on the same settings is better with all of it (`all`): a day is too short to find new moments
(docs/RESULTS.md). It continues as if resumed, steps counted on; only the schedule begins again, so that rates do not
shrink for ever.
"""

import re
import tempfile
from collections.abc import Callable, Collection, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import xxhash
from pydantic import TypeAdapter, ValidationError
from safetensors import SafetensorError, safe_open
from torch import Tensor

from featurestore.errors import CorruptFileError, FormatVersionError, StorageError
from featurestore.lookup.cache import RUNS, default_cache_dir
from featurestore.parsing import first_mistake
from featurestore.published.paths import RunPath, read_file, run_path, write_file
from featurestore.spec import FileName, Sealed, unseal
from featurestore.storage.local import claim
from featurestore.store import SnapshotId
from trainer import errors
from trainer.comm import Comm
from trainer.config import SAMPLES_DIGEST, Config, Decision, Difference, RunConfig, Section, WarmParts, differences
from trainer.engine.engine import Engine
from trainer.engine.wiring import NO_IMAGES
from trainer.ids.shards import check_names
from trainer.problems import Problem
from trainer.runs.folder import STATE, Checkpoint, checkpoint_at, find_checkpoint, finished
from trainer.samples.reader import BatchPosition

TO_RESUME: tuple[Decision, ...] = ("training", "nothing")
TO_READ: tuple[Decision, ...] = ("positions", *TO_RESUME)
"""Decisions that may differ from a checkpoint: of a run that continues it, and of an evaluation or export."""
DENSE, ROWS = "dense.safetensors", "rows-{rank:05}-of-{ranks:05}.safetensors"
"""Rank `rank` of those that wrote a checkpoint owned the shards `rank`, `rank` + `ranks`, and so on of each table."""
_BLOCK_BYTES = 8 << 20
_ROWS = re.compile(r"rows-(?P<rank>\d+)-of-(?P<ranks>\d+)\.safetensors")


class RunFingerprint(Section):
    """The run that a checkpoint belongs to; it is refused where one of these values differs."""

    data: dict[str, Any]
    """Meaning of a position in the data: the settings that decide on it, and the digest of the samples."""
    train: dict[str, Any]
    """The same of this section: the seed."""
    model: dict[str, Any]
    """Section model of the configuration, and the fields of the schema."""
    stores: dict[str, dict[str, Any]]
    """ExtractorSpec, dimension, dtype and basis of each feature store, by name; none where the model has no images."""
    optim: dict[str, Any]
    """Meaning of the optimiser's state: the settings that decide on parameters and rows."""

    def check_same(
        self, recorded: "RunFingerprint", checkpoint: Checkpoint, may_differ: Collection[Decision] = TO_RESUME
    ) -> None:
        """Raise RunMismatchError naming every value that `recorded`, of the checkpoint, has otherwise.

        Settings that decide on one of the kinds `may_differ` are not compared.
        """
        self.check_store(recorded, checkpoint)
        found = self.differences(recorded, may_differ)
        if found:
            raise errors.RunMismatchError(Problem.CHECKPOINT_OF_OTHER_RUN, str(checkpoint), _texts(found))

    def differences(self, recorded: "RunFingerprint", may_differ: Collection[Decision]) -> list[Difference]:
        """List the settings that `recorded` has otherwise, except those that decide on one of the kinds `may_differ`.

        Fields count in their order, which the layers read them in.
        """
        found = differences(self.model_dump(), recorded.model_dump(), may_differ)
        here, there = (" ".join(each.model.get("fields", {})) for each in (self, recorded))
        return found or ([] if here == there else [Difference("model.fields", here, there, "parameters")])

    def check_store(self, recorded: "RunFingerprint", checkpoint: Checkpoint) -> None:
        """Raise RunMismatchError where E of the checkpoint was trained on features of another kind."""
        found = differences({"stores": self.stores}, {"stores": recorded.stores})
        if not found:
            return
        if bool(self.stores) != bool(recorded.stores):
            had = Problem.CHECKPOINT_HAS_IMAGES if recorded.stores else Problem.CHECKPOINT_WITHOUT_IMAGES
            raise errors.RunMismatchError(had, str(checkpoint))
        raise errors.RunMismatchError(Problem.CHECKPOINT_OF_OTHER_FEATURES, str(checkpoint), _texts(found))


class CheckpointState(Sealed):
    """The content of state.json, which describes a checkpoint."""

    step: int
    epoch: int
    step_in_epoch: int
    num_ranks: int
    origin: RunFingerprint
    stores: dict[str, SnapshotId]
    """The snapshot of every store by name."""
    history: list[dict[str, Any]]
    files: dict[FileName, str]
    """xxh3-128 of each file's bytes."""

    @property
    def position(self) -> BatchPosition:
        """The batch that comes next."""
        return BatchPosition(self.epoch, self.step_in_epoch)

    def version_of(self, store: str) -> int | None:
        """Return the snapshot of that store; None for a store that the checkpoint does not have."""
        return self.stores[store].version if store in self.stores else None


def read_state(checkpoint: Checkpoint) -> CheckpointState:
    """Read state.json with the stores that were accepted in the place of lost ones. Raises as `read_recorded`."""
    state = read_recorded(checkpoint)
    stores = dict(state.stores)
    for each in _read_accepted(checkpoint.run / ACCEPTED_FILE):
        stores |= {name: each.accepted for name, record in stores.items() if each.replaces(name, record)}
    return state.model_copy(update={"stores": stores})


def read_recorded(checkpoint: Checkpoint) -> CheckpointState:
    """Read state.json of the checkpoint and verify its digest.

    Raises CheckpointError; DamagedCheckpointError for one that is damaged.
    """
    file = f"{checkpoint}/{STATE}"
    try:
        state = unseal(checkpoint.read_bytes(STATE), CheckpointState, file)
    except FileNotFoundError as failure:
        raise errors.DamagedCheckpointError(Problem.CHECKPOINT_FILE_DAMAGED, file, failure) from failure
    except CorruptFileError as failure:
        raise errors.DamagedCheckpointError(Problem.CHECKPOINT_FILE_BAD, failure) from failure
    except FormatVersionError as failure:
        raise errors.CheckpointError(*failure.args) from failure
    except (OSError, StorageError) as failure:
        raise errors.CheckpointError(Problem.REFUSED, "read", file, failure) from failure
    if DENSE not in state.files:
        raise errors.DamagedCheckpointError(Problem.CHECKPOINT_FILE_UNLISTED, file, DENSE)
    return state


def load(
    comm: Comm, checkpoint: Checkpoint, state: CheckpointState, trained: Engine, cache_dir: str | None = None
) -> None:
    """Put the checkpoint into the engine; each rank reads the shards that it owns now, whichever rank wrote them.

    A rank verifies and reads the files that have a shard of it; from an object store it copies one at a time to
    `cache_dir`. Raises CheckpointError on all ranks, naming the file, where one is missing, damaged
    (DamagedCheckpointError) or does not fit.
    """
    with comm.agreed(), saying("read", checkpoint):
        trained.load_dense_state(read_dense(checkpoint, state, cache_dir))
        trained.load_shard_state(read_rows(checkpoint, state, trained.shard_names(), cache_dir))


def read_dense(
    checkpoint: Checkpoint, state: CheckpointState, cache_dir: str | None = None, prefix: str = ""
) -> dict[str, Tensor]:
    """Read the state that all ranks share: the tensors whose names begin with `prefix`, without it.

    They are mapped into memory: only pages in use take any. Raises CheckpointError."""
    with (
        saying("read", checkpoint),
        local_copy(checkpoint, DENSE, state.files[DENSE], cache_dir) as file,
    ):
        return {name.removeprefix(prefix): each for name, each in _mapped(file).items() if name.startswith(prefix)}


def read_rows(
    checkpoint: Checkpoint, state: CheckpointState, names: Iterable[str], cache_dir: str | None = None
) -> dict[str, Tensor]:
    """Read the named tensors, <table>/<shard>/<part>, out of the files of the ranks that owned them, as `read_dense`.

    Raises CheckpointError where one is lacking."""
    wanted, found = set(names), dict[str, Tensor]()
    shards = {int(name.rsplit("/", 2)[1]) for name in wanted}
    with saying("read", checkpoint):
        for name in sorted(state.files):
            written = _ROWS.fullmatch(name)
            if written and any(shard % int(written["ranks"]) == int(written["rank"]) for shard in shards):
                with local_copy(checkpoint, name, state.files[name], cache_dir) as file:
                    found |= {each: values for each, values in _mapped(file).items() if each in wanted}
    if lacking := sorted(wanted - found.keys()):
        raise errors.CheckpointError(Problem.LACKS_ROWS, str(checkpoint), lacking[0], len(lacking) - 1)
    return found


@contextmanager
def local_copy(checkpoint: Checkpoint, file: str, digest: str, cache_dir: str | None = None) -> Iterator[Path]:
    """Return a file of this machine with the content of a checkpoint's file: itself, or a copy in the cache folder.

    The copy is there for the block. `digest` is the xxh3-128 that the file has to have. Raises DamagedCheckpointError
    for another one, or where the file is gone, OSError, StorageError.
    """
    with ExitStack() as opened:
        found, copy = xxhash.xxh3_128(), None
        try:
            content = opened.enter_context(checkpoint.open_input(file))
        except FileNotFoundError as failure:
            raise errors.DamagedCheckpointError(Problem.CHECKPOINT_FILE_MISSING, f"{checkpoint}/{file}") from failure
        if not checkpoint.files.is_local:
            folder = Path(cache_dir or default_cache_dir())
            for each in (folder, copies := folder / RUNS):
                claim(each)
            copy = opened.enter_context(tempfile.NamedTemporaryFile(dir=copies, prefix=".tmp-", suffix=f"-{file}"))
        while block := content.read(_BLOCK_BYTES):
            found.update(block)
            if copy is not None:
                copy.write(block)
        if found.hexdigest() != digest:
            raise errors.DamagedCheckpointError(Problem.CHECKPOINT_FILE_CHANGED, f"{checkpoint}/{file}")
        if copy is not None:
            copy.flush()
        yield Path(checkpoint.path(file) if copy is None else copy.name)


def _texts(found: Iterable[Difference]) -> str:
    other = {SAMPLES_DIGEST: ": these are other training samples, or their files have changed since"}
    return "\n  ".join(each.text("in the checkpoint") + other.get(each.name, "") for each in found)


@contextmanager
def saying(action: str, checkpoint: Checkpoint) -> Iterator[None]:
    """Turn an error of the disk, the object store or a file's format into a CheckpointError with this action."""
    try:
        yield
    except (OSError, SafetensorError, StorageError) as failure:
        raise errors.CheckpointError(Problem.REFUSED, action, str(checkpoint), failure) from failure


def _mapped(local: Path) -> dict[str, Tensor]:
    """The tensors of a file, mapped into memory, also once its name is gone."""
    with safe_open(local, framework="pt") as file:
        return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - the file is not a mapping


Resumed = tuple[Checkpoint, CheckpointState]
Opened = TypeVar("Opened")


@dataclass(frozen=True)
class SkippedCheckpoint:
    """A damaged checkpoint that a resumed run skips, and the reason."""

    checkpoint: Checkpoint
    why: str


def continued(
    comm: Comm, config: Config, folder: RunPath, open_at: Callable[[Resumed | None, list[SkippedCheckpoint]], Opened]
) -> Opened:
    """Return what `open_at` opens at the checkpoint that `run.resume` says, or at None for a run that begins.

    Where that is the newest one, and it is damaged, `open_at` gets the one before it and the skipped ones, newest
    first. Raises the errors of `open_at`; where all checkpoints are damaged, that of the newest. Every rank calls it.
    """
    skipped: list[SkippedCheckpoint] = []
    newest: Exception | None = None
    for checkpoint in comm.on_rank_0(partial(_to_try, config, folder)):  # another rank may see other ones
        try:
            state = comm.on_all(partial(read_state, checkpoint))
            return open_at((checkpoint, state), skipped)
        except (errors.DamagedCheckpointError, errors.RemoteRankError) as failure:
            here = {"kind": errors.DamagedCheckpointError.__name__, "reason": failure}
            found = failure.values if isinstance(failure, errors.RemoteRankError) else here
            if found["kind"] != here["kind"]:
                raise
            newest, why = newest or failure, str(found["reason"]).rpartition("; ")[0]  # without its way out
            skipped = [*skipped, SkippedCheckpoint(checkpoint, why)]
    if newest is not None:
        raise newest
    return open_at(None, [])


def _to_try(config: Config, folder: RunPath) -> list[Checkpoint]:
    """List the checkpoints to continue from: that of run.resume, or all, newest first, where it is the newest."""
    resume = config.run.resume
    found = finished(folder)[::-1] if resume in ("latest", "auto") else []
    if found or resume in (None, "auto"):
        return found
    return [find_checkpoint(folder, resume, "run.resume=")]


ACCEPTED_FILE = "accepted-stores.json"
"""Stores that a user accepted in the place of the one a run was trained on: computed again after a loss, say.

It lies in the run's folder, so every command that opens one of its checkpoints finds it; `crossmedia compat RUN
STORE --accept` writes it."""


class AcceptedStore(Section):
    """A store that replaces the one called `name` in the schema: `accepted` is read where a checkpoint has `recorded`.

    `figures`: what was known of the two when that was decided.
    """

    name: str
    recorded: SnapshotId
    accepted: SnapshotId
    figures: dict[str, Any]

    def replaces(self, name: str, record: SnapshotId) -> bool:
        """Return whether `record` is of the store that was replaced.

        Of one store put back from a backup, it has to be the very snapshot."""
        if (name, record.store_id) != (self.name, self.recorded.store_id):
            return False
        return self.accepted.store_id != record.store_id or record.commit_id == self.recorded.commit_id


_ACCEPTED = TypeAdapter(list[AcceptedStore])


def accept(checkpoint: Checkpoint, store: AcceptedStore) -> RunPath | None:
    """Accept a store for the checkpoint's run, in place of an earlier one for the same; returns the file.

    The recorded store itself takes back what was accepted; None where nothing was. Raises CheckpointError where the
    file cannot be written.
    """
    file = checkpoint.run / ACCEPTED_FILE
    before = _read_accepted(file)
    others = [each for each in before if not each.replaces(store.name, store.recorded)]
    is_back = store.recorded.is_same(store.accepted)
    if is_back and len(others) == len(before):
        return None
    try:
        write_file(file, _ACCEPTED.dump_json(others if is_back else [*others, store], indent=1) + b"\n")
    except (OSError, StorageError) as failure:
        raise errors.CheckpointError(Problem.REFUSED, "write", file, failure) from failure
    return file


def _read_accepted(file: RunPath) -> list[AcceptedStore]:
    try:
        return _ACCEPTED.validate_json(read_file(file))
    except FileNotFoundError:
        return []
    except (OSError, StorageError, ValidationError) as failure:
        first = first_mistake(failure) if isinstance(failure, ValidationError) else failure
        raise errors.CheckpointError(Problem.ACCEPTED_STORES_DAMAGED, file, first) from failure


_NETWORKS = ("stores.", "model.")
"""Prefixes of the parameters and buffers of the networks: E of each store, and the layers above."""
_DECIDED = "model.new_ads.counts"
"""Buffer set by evaluations (model.image_dropout): a run may begin without it, or drop it, like the vectors of
`NO_IMAGES`, which data.missing decides on."""
_NOT_LEARNED = {"model.compute_dtype", "model.image_dropout", "model.label", "model.tables"}
"""Settings that may differ in a warm start; tables may have more room, and other shapes are noticed."""


@dataclass(frozen=True)
class WarmStart:
    """A checkpoint to begin with, and what to take: all but the ID vectors, or everything."""

    checkpoint: Checkpoint
    state: CheckpointState
    parts: WarmParts


def find_warm_start(run: RunConfig) -> WarmStart | None:
    """Read the checkpoint that run.warm_start names, if it does: a run's folder means its newest one.

    Raises CheckpointError."""
    if run.warm_start is None:
        return None
    place = run_path(run.warm_start)
    try:
        found = checkpoint_at(place) or find_checkpoint(place)
    except errors.CheckpointNotFoundError as failure:
        raise errors.CheckpointNotFoundError(
            Problem.SETTING_WRONG, "run.warm_start", run.warm_start, failure
        ) from failure
    return WarmStart(found, read_state(found), run.warm_parts)


def warm_start(
    comm: Comm, warm: WarmStart, origin: RunFingerprint, trained: Engine, cache_dir: str | None = None
) -> None:
    """Copy the parts that a warm start takes into `trained`; it may be of more or fewer ranks.

    Raises CheckpointError on all ranks where a file is damaged, or where what was learned would mean something else
    under the settings, the fields or the stores of this run.
    """
    origin.check_store(warm.state.origin, warm.checkpoint)
    own = TO_READ if warm.parts == "all" else (*TO_READ, "rows")
    found = [each for each in origin.differences(warm.state.origin, own) if each.setting not in _NOT_LEARNED]
    if found:
        raise errors.CheckpointError(Problem.WARM_START_OF_OTHER_RUN, str(warm.checkpoint), _texts(found))
    if warm.parts == "all":
        load(comm, warm.checkpoint, warm.state, trained, cache_dir)
        return
    with comm.agreed(), saying("read", warm.checkpoint):
        mine, theirs = trained.dense_state(), read_dense(warm.checkpoint, warm.state, cache_dir)
        idle = {_DECIDED} - (mine.keys() & theirs.keys())
        idle |= {name for name in mine.keys() ^ theirs.keys() if NO_IMAGES in name}
        own_networks, taken = (
            {name: value for name, value in each.items() if name.startswith(_NETWORKS) and name not in idle}
            for each in (mine, theirs)
        )
        check_names(own_networks, taken)
        trained.warm_start_dense(taken)
