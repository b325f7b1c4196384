"""The server's access to the published versions of a bundle."""

import logging

from serving.bundle.open import BundleIdentity
from serving.http.live.model import Identity, Model
from serving.http.settings import ServerSettings
from serving.scoring.scorer import Scorer

logger = logging.getLogger("serving")


class BundleSource:
    """Versions of the bundle at one address."""

    def __init__(self, settings: ServerSettings) -> None:
        self._url, self._cache_dir = settings.model, settings.cache_dir

    def newest(self) -> BundleIdentity:
        """Look up the version in use, and its newest vectors; a few small reads."""
        return BundleIdentity.newest(self._url)

    def open(self, identity: Identity, current: Model | None) -> Scorer:
        """Load a version with these vectors; newer vectors of the current version keep its network and ID rows.

        Raises BundleNotFoundError, BrokenBundleError, SnapshotNotFoundError, StorageError.
        """
        if isinstance(current, Scorer) and current.identity.version == identity.version:
            return Scorer(current.bundle.with_vectors(identity.vectors))
        scorer = Scorer.open(self._url, identity.version, vectors=identity.vectors, cache_dir=self._cache_dir)
        if (note := scorer.bundle.network.note) is not None:
            logger.warning("version %d: %s", identity.version, note)
        return scorer
