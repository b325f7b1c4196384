"""Scores of sample files with a bundle: row group by row group, by a scorer in this process or a server over HTTP."""

import contextlib
import ssl
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import quote

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from featurestore.parsing import parse_json
from featurestore.text import one_line
from serving.errors import NotFiniteError, ServerSettingsError, ServingError
from serving.scoring.request import sizes_of
from serving.scoring.scorer import Scorer
from trainer.comm import SoloComm
from trainer.errors import DataError
from trainer.evaluation.predict import Written, open_scores
from trainer.runs.saved import TEST
from trainer.samples.columns import Rule
from trainer.samples.index import SampleIndex, open_index, read_row_groups

ScoreTable = Callable[[pa.Table], Sequence[NDArray[np.float32]]]
"""The logits of each row of a table."""


def score_samples(score: ScoreTable, index: SampleIndex, columns: Mapping[str, Rule]) -> Iterator[NDArray[np.float64]]:
    """Score the impressions of each row group of `index`, (B,), in its order. `columns`: those of the model.

    Raises RequestError, DataError.
    """
    for row_group, table in read_row_groups(index.storage, index.row_groups, list(columns)):
        logits: list[NDArray[np.float32]] = []
        for piece in sizes_of(table, columns).pieces():
            try:
                logits += score(table.slice(piece.start, piece.stop - piece.start))
            except NotFiniteError as failure:
                first = f"{index.storage.full(row_group.file)}, from row {row_group.first_row + piece.start}"
                raise DataError(f"{first}: {failure}") from None
        yield np.concatenate(logits).astype(np.float64)


def score_model(url: str, samples: str, out: str, version: int | None = None) -> Written:
    """Score the impressions in test/ of `samples` with a bundle, by default the version in use; write them to `out`.

    The file is like that of `trainer.evaluation.predict`. Raises ServingError, TrainerError, FeatureStoreError.
    """
    with contextlib.closing(Scorer.open(url, version)) as scorer:
        manifest, schema = scorer.bundle.manifest, scorer.bundle.schema
        index = open_index(SoloComm(), samples, TEST, schema)
        about = {
            "model": scorer.bundle.storage.url,
            "version": manifest.version,
            "vectors": dict(scorer.identity.vectors),
            "run": manifest.run,
            "checkpoint": manifest.checkpoint,
            "checkpoint_digest": manifest.checkpoint_digest,
            "samples": index.storage.url,
            "missing": manifest.missing,
        }
        with open_scores(out, index, schema, about) as file:
            logits = score_samples(in_process(scorer), index, scorer.columns)
            for row_group, logit_B in zip(index.row_groups, logits, strict=True):
                file.add(row_group, logit_B)
            return file.written()


def in_process(scorer: Scorer) -> ScoreTable:
    """Return a function that scores a table in this process."""
    return lambda table: [each.logits_C for each in scorer.score(table)]


_ARROW = "application/vnd.apache.arrow.stream"
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
        """Return the logits of each row of a table. Raises ServingError if the server does not answer."""
        sink = pa.BufferOutputStream()
        with pa.ipc.new_stream(sink, table.schema) as writer:
            writer.write_table(table)
        answer = pa.ipc.open_stream(self._sent("/v1/score", sink.getvalue().to_pybytes())).read_all()
        self.version = int((answer.schema.metadata or {})[b"version"])
        logits: Any = answer["logit"].combine_chunks()
        return [np.asarray(row.values.to_numpy(), np.float32) for row in logits]

    def depths(self) -> dict[str, int]:
        """Return the columns of the server's model, and how many lists are around the values of each in a request.

        Raises ServingError.
        """
        try:
            name = parse_json(self._sent("/"))["name"]
            inputs = parse_json(self._sent(f"/v2/models/{quote(name)}"))["inputs"]
            return {each["name"]: 0 if each["shape"] == [1] else len(each["shape"]) for each in inputs}
        except (ValueError, KeyError, TypeError) as failure:
            raise ServingError(f"{self.url} is not a scorer: its description is another's: {failure!r}") from None

    def _sent(self, path: str, body: bytes | None = None) -> bytes:
        """Post an Arrow body to the server, or get what is there, and return its answer. Raises ServingError."""
        headers = {"Content-Type": _ARROW} | ({"Authorization": f"Bearer {self.token}"} if self.token else {})
        try:
            request = urllib.request.Request(f"{self.url.rstrip('/')}{path}", body, headers)
            with urllib.request.urlopen(request, timeout=_TIMEOUT_S, context=self.context) as response:
                answer: bytes = response.read()
                return answer
        except urllib.error.HTTPError as failure:
            said = failure.read(2_000).decode(errors="replace")
            raise ServingError(f"{self.url} answers {failure.code}: {one_line(said)}") from None
        except (OSError, ValueError) as failure:
            if isinstance(why := getattr(failure, "reason", None), ssl.SSLCertVerificationError):
                raise ServingError(
                    f"{self.url}: its certificate is refused, {why.verify_message}; name those to trust by --ca"
                ) from None
            raise ServingError(
                f"{self.url} does not answer: {one_line(failure)}; is that the server's --url?"
            ) from None


def ca_context(file: Path | None) -> ssl.SSLContext | None:
    """Return a TLS context that trusts the PEM file of --ca, or None without one. Raises ServerSettingsError."""
    if file is None:
        return None
    try:
        return ssl.create_default_context(cafile=file)
    except OSError as failure:  # of TLS too
        why = "it has no certificate" if isinstance(failure, ssl.SSLError) else failure.strerror
        raise ServerSettingsError(f"--ca {file}: {why}; name a PEM file of certificates") from None
