"""Scores of sample files with a bundle: row group by row group, by a scorer in this process or one over HTTP."""

import contextlib
import ssl
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from featurestore.text.plain import one_line
from serving.errors import ServerSettingsError, ServingError
from serving.scoring.scorer import Scorer
from trainer.comm import SoloComm
from trainer.evaluation.scores import Written, open_scores
from trainer.runs.saved import TEST
from trainer.samples.columns import Rule
from trainer.samples.reader import SampleIndex, open_index, read_row_group

ScoreTable = Callable[[pa.Table], Sequence[NDArray[np.float32]]]
"""The logits of each row of a table."""

_BLOCK_CANDIDATES = 2_000
_ARROW = "application/vnd.apache.arrow.stream"
_TIMEOUT_S = 60


def score_samples(score: ScoreTable, index: SampleIndex, columns: Mapping[str, Rule]) -> Iterator[NDArray[np.float64]]:
    """Score the impressions of each row group of `index`, (B,), in its order. `columns`: those of the model.

    Raises RequestError, DataError.
    """
    for row_group in index.row_groups:
        table = read_row_group(index.storage, row_group, list(columns))
        rows = max(1, _BLOCK_CANDIDATES * row_group.num_groups // row_group.num_samples)
        blocks = [table.slice(start, rows) for start in range(0, table.num_rows, rows)]
        yield np.concatenate([np.concatenate(score(block)) for block in blocks]).astype(np.float64)


def score_model(url: str, samples: str, out: str, version: int | None = None) -> Written:
    """Score the impressions of test/ of `samples` with a bundle, by default the version in use, into the file `out`.

    The file is that of `trainer.evaluation.scores`. Raises ServingError, TrainerError, FeatureStoreError.
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
    """Return what scores a table in this process."""
    return lambda table: [each.logits_C for each in scorer.score_table(table)]


@dataclass
class RemoteScorer:
    """A running server, asked over HTTP with Arrow bodies."""

    url: str
    token: str | None = None
    context: ssl.SSLContext | None = None
    """What the server's certificate is checked by; None: what the system trusts."""
    version: int | None = None
    """Of the model that answered last."""

    def score(self, table: pa.Table) -> list[NDArray[np.float32]]:
        """Return the logits of each row of a table. Raises ServingError where the server does not answer."""
        logits: Any = self.ask(table)["logit"].combine_chunks()
        return [np.asarray(row.values.to_numpy(), np.float32) for row in logits]

    def ask(self, table: pa.Table) -> pa.Table:
        """Return the whole answer, a row for each row of a table: score, logit, and what was unknown and missing.

        Raises ServingError where the server does not answer."""
        sink = pa.BufferOutputStream()
        with pa.ipc.new_stream(sink, table.schema) as writer:
            writer.write_table(table)
        answer = pa.ipc.open_stream(self.read("/v1/score", sink.getvalue().to_pybytes())).read_all()
        self.version = int((answer.schema.metadata or {})[b"version"])
        return answer

    def read(self, path: str, body: bytes | None = None, timeout_s: float = _TIMEOUT_S) -> bytes:
        """Return the answer of an address of the server, to an Arrow body where there is one. Raises ServingError."""
        headers = ({"Content-Type": _ARROW} if body is not None else {}) | (
            {"Authorization": f"Bearer {self.token}"} if self.token else {}
        )
        try:
            request = urllib.request.Request(f"{self.url.rstrip('/')}{path}", body, headers)
            with urllib.request.urlopen(request, timeout=timeout_s, context=self.context) as response:
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


def trusted(file: Path) -> ssl.SSLContext:
    """Trust the certificates in a PEM file. Raises ServerSettingsError."""
    try:
        return ssl.create_default_context(cafile=file)
    except OSError as failure:  # of TLS too
        why = "it has no certificate in PEM" if isinstance(failure, ssl.SSLError) else failure.strerror
        raise ServerSettingsError(f"--ca {file}: {why}") from None
