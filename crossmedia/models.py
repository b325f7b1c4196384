"""Score with a published model: in this process, or by a server."""

from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

from featurestore.text import Shown
from serving.scoring.samples import RemoteScorer, ca_context
from serving.scoring.scorer import Scorer
from trainer.evaluation.predict import scores_of
from trainer.samples.columns import groups_of_rows
from trainer.schema.profile import table_of


def load_model(url: str | Path, version: int | None = None, *, cache_dir: str | Path | None = None) -> "Model":
    """Open a published model, by default its version in use. Raises ServingError, FeatureStoreError."""
    return Model(Scorer.open(str(url), version, cache_dir=cache_dir))


class Model(Shown, AbstractContextManager["Model"]):
    """A version of a published model in this process; a context manager, or `close` it."""

    def __init__(self, scorer: Scorer) -> None:
        self.scorer = scorer

    @property
    def version(self) -> int:
        """The version of the model."""
        return self.scorer.identity.version

    def score(self, rows: Any) -> Any:
        """Score rows: logit and probability of each.

        They have the columns of the samples, an impression each or, with lists of ads, a request each; see
        `with_behaviors` for a raw log. Raises RequestError, DataError.
        """
        table = groups_of_rows(table_of(rows), {name: rule.depth for name, rule in self.scorer.inputs.sources.items()})
        return scores_of(rows, [each.logits_C for each in self.scorer.score(table)])

    def close(self) -> None:
        """Close the model."""
        self.scorer.close()

    def __exit__(self, *_: object) -> None:
        self.close()

    def _about(self) -> tuple[str, dict[str, Any]]:
        scorer, vectors = self.scorer, dict(self.scorer.identity.vectors)
        return scorer.storage.url, {"version": self.version, "run": scorer.manifest.run, "vectors": vectors}


class Client(Shown):
    """A server of `crossmedia serve`; it gives the scores of the model that it serves.

    `ca`: a PEM file of certificates to trust, in place of the system's.
    """

    def __init__(self, url: str, token: str | None = None, ca: str | Path | None = None) -> None:
        self._remote = RemoteScorer(url, token, ca_context(None if ca is None else Path(ca)))

    def score(self, rows: Any) -> Any:
        """Score rows as `Model.score` does. Raises ServingError."""
        table = groups_of_rows(table_of(rows), self._remote.depths())
        return scores_of(rows, self._remote.score(table))

    def _about(self) -> tuple[str, dict[str, Any]]:
        return self._remote.url, {}
