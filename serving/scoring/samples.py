"""Scores of sample files with a bundle, by a scorer in this process or a server, and their distance from the run."""

import contextlib
import ssl
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any
from urllib.parse import quote

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from featurestore.parsing import parse_json
from featurestore.published.paths import RunPath, run_path
from featurestore.text import one_line
from serving.bundle.files import open_vectors
from serving.bundle.open import ModelVersion
from serving.errors import BrokenBundleError, NotFiniteError, ServerSettingsError, ServingError
from serving.network import run_steps
from serving.problems import Problem
from serving.scoring.request import RequestColumns
from serving.scoring.scorer import Scorer
from serving.scoring.sent import ARROW, PIECE_REQUESTS, sent_table, stream_of
from trainer.comm import SoloComm
from trainer.errors import DataError
from trainer.evaluation.predict import Written, open_scores, predict, written_ids
from trainer.runs.saved import TEST, PredictingRun, open_test, open_trained
from trainer.samples.columns import plain
from trainer.samples.index import SampleIndex, open_index, read_row_groups
from trainer.samples.survey import IdDictionary

ScoreTable = Callable[[pa.Table], Sequence[NDArray[np.float32]]]
"""The logits of each row of a table."""


def score_samples(score: ScoreTable, index: SampleIndex, columns: RequestColumns) -> Iterator[NDArray[np.float64]]:
    """Score the impressions of each row group of `index`, (B,), in its order. `columns`: those of the model.

    Raises RequestError, DataError.
    """
    for row_group, table in read_row_groups(index.storage, index.row_groups, list(columns.sources)):
        logits: list[NDArray[np.float32]] = []
        for piece in run_steps(sent_table(columns, table)).sizes(columns).pieces():
            try:
                logits += score(table.slice(piece.start, piece.stop - piece.start))
            except NotFiniteError as failure:
                first = f"{index.storage.full(row_group.file)}, from row {row_group.first_row + piece.start}"
                raise DataError(Problem.WRONG, first, failure) from None
        yield np.concatenate(logits).astype(np.float64)


def score_model(url: str, samples: str, out: str, version: int | None = None) -> Written:
    """Score the impressions in test/ of `samples` with a bundle, by default the version in use; write them to `out`.

    The file is like that of `trainer.evaluation.predict`. Raises ServingError, TrainerError, FeatureStoreError.
    """
    with contextlib.closing(Scorer.open(url, version)) as scorer:
        schema = scorer.schema
        index = open_index(SoloComm(), samples, TEST, schema)
        about = scorer.manifest.model_dump(include={"version", "run", "checkpoint", "checkpoint_digest", "missing"})
        about |= {"model": scorer.storage.url, "vectors": dict(scorer.identity.vectors), "samples": index.storage.url}
        dictionary = IdDictionary.of_samples(index.storage)
        texts = written_ids(index, schema, [dictionary] if dictionary else [])
        with open_scores(out, index, schema, about, texts) as file:
            logits = score_samples(in_process(scorer), index, scorer.inputs)
            for row_group, logit_B in zip(index.row_groups, logits, strict=True):
                file.add(row_group, logit_B)
            return file.written()


def in_process(scorer: Scorer) -> ScoreTable:
    """Return a function that scores a table in this process."""
    return lambda table: [each.logits_C for each in scorer.score(table)]


_TIMEOUT_S = 60


@dataclass
class RemoteScorer:
    """Scores tables with a running server, over HTTP with Arrow bodies."""

    url: str
    token: str | None = None
    context: ssl.SSLContext | None = None
    """Context for the check of the server's certificate; None: the system's certificates."""
    version: int | None = None
    """Version of the model that answered last."""

    def score(self, table: pa.Table) -> list[NDArray[np.float32]]:
        """Return the logits of each row of a table, however long. Raises ServingError if the server does not answer."""
        found: list[NDArray[np.float32]] = []
        for start in range(0, table.num_rows, PIECE_REQUESTS):
            body = stream_of(plain(table.slice(start, PIECE_REQUESTS)))
            answer = pa.ipc.open_stream(self._sent("/v1/score", body)).read_all()
            self.version = int((answer.schema.metadata or {})[b"version"])
            logits: Any = answer["logit"].combine_chunks()
            found += [np.asarray(row.values.to_numpy(), np.float32) for row in logits]
        return found

    def depths(self) -> dict[str, int]:
        """Return the columns of the server's model, and how many lists are around the values of each in a request.

        Raises ServingError.
        """
        try:
            name = parse_json(self._sent("/"))["name"]
            inputs = parse_json(self._sent(f"/v2/models/{quote(name)}"))["inputs"]
            return {each["name"]: 0 if each["shape"] == [1] else len(each["shape"]) for each in inputs}
        except (ValueError, KeyError, TypeError) as failure:
            raise ServingError(Problem.NOT_SCORER, self.url, failure) from None

    def _sent(self, path: str, body: bytes | None = None) -> bytes:
        """Post an Arrow body to the server, or get what is there, and return its answer. Raises ServingError."""
        headers = {"Content-Type": ARROW} | ({"Authorization": f"Bearer {self.token}"} if self.token else {})
        try:
            request = urllib.request.Request(f"{self.url.rstrip('/')}{path}", body, headers)
            with urllib.request.urlopen(request, timeout=_TIMEOUT_S, context=self.context) as response:
                answer: bytes = response.read()
                return answer
        except urllib.error.HTTPError as failure:
            said = failure.read(2_000).decode(errors="replace")
            with contextlib.suppress(ValueError, KeyError, TypeError):  # of another server: shown as it is
                said = parse_json(said)["error"]
            raise ServingError(Problem.ANSWERS, self.url, failure.code, one_line(said)) from None
        except (OSError, ValueError) as failure:
            if isinstance(why := getattr(failure, "reason", None), ssl.SSLCertVerificationError):
                raise ServingError(Problem.CERTIFICATE_REFUSED, self.url, why.verify_message) from None
            raise ServingError(Problem.NO_ANSWER, self.url, one_line(failure)) from None


def ca_context(file: Path | None) -> ssl.SSLContext | None:
    """Return a TLS context that trusts the PEM file of --ca, or None without one. Raises ServerSettingsError."""
    if file is None:
        return None
    try:
        return ssl.create_default_context(cafile=file)
    except OSError as failure:  # of TLS too
        why = "it has no certificate" if isinstance(failure, ssl.SSLError) else failure.strerror
        raise ServerSettingsError(Problem.UNUSABLE_CA, file, why) from None


TOLERANCE = 1e-5
"""Largest difference of a logit if E multiplies in float32 or float64."""
BFLOAT16_TOLERANCE = 0.01
"""Largest difference of a logit if E multiplies in bfloat16. The order of the sums of an image depends on the number of
images in the product; this may round a number of its vector differently, by up to 2 ** -8 of its value."""


@dataclass(frozen=True)
class LogitsCompared:
    """Differences between the logits of a bundle and of its run."""

    impressions: int
    worst: float
    mean: float
    tolerance: float
    """Largest difference of a logit that rounding alone may cause for this run."""
    notes: tuple[str, ...]
    """Notes for the user on these differences."""


def compare(
    model: ModelVersion,
    score: ScoreTable,
    *,
    run: RunPath | None = None,
    samples: str | None = None,
    impressions: int,
) -> LogitsCompared:
    """Score test impressions by `score`, which serves the bundle `model`, and by the engine of its run.

    `run`: the run's current address, by default the one it was exported from. `samples`: by default the run's own.
    `impressions`: about how many, the first row groups with as many at least. Images are looked up in the snapshot that
    the vectors match. Raises BrokenBundleError if the run's checkpoint is a different one, TrainerError, ServingError.
    """
    manifest = model.manifest
    vectors = {of.store: open_vectors(model.storage, manifest, of) for of in manifest.vectors}
    snapshots = {name: each.source.version for name, each in vectors.items()}
    first = next(iter(snapshots.values()), None)
    with contextlib.closing(
        open_trained(run or run_path(manifest.run), SoloComm(), which=manifest.checkpoint, store_version=first)
    ) as trained:
        if trained.saved.digest != manifest.checkpoint_digest:
            digests = trained.saved.digest[:12], manifest.checkpoint_digest[:12]
            raise BrokenBundleError(Problem.OTHER_CHECKPOINT, trained.saved.checkpoint, manifest.version, *digests)
        index = open_test(SoloComm(), trained.config, trained.schema, samples)
        starts = np.cumsum([0, *(each.num_samples for each in index.row_groups)])[:-1]
        index = replace(index, row_groups=index.row_groups[: int((starts < impressions).sum())])
        columns = RequestColumns(model.schema, model.fields)
        online_N = np.concatenate(list(score_samples(score, index, columns)))
        offline_N, _ = predict(PredictingRun(**vars(trained), test=index, notes=[]))
        notes = trained.saved.notes_on_missing(trained.missing_lookups())
        tolerance = BFLOAT16_TOLERANCE if trained.config.model.compute_dtype == "bfloat16" else TOLERANCE
        used = {name: record.version for name, record in trained.stores.items()}
    for name, version in snapshots.items():
        if used.get(name, version) != version:
            notes.append(f"the run reads images of {name} from snapshot {used[name]}, but the vectors match {version}")
    apart_N = np.abs(online_N - offline_N)
    return LogitsCompared(len(apart_N), float(apart_N.max()), float(apart_N.mean()), tolerance, tuple(notes))
