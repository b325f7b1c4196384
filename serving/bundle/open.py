"""An open version of a bundle: all files of a scorer, verified, with ID rows and vectors mapped into memory."""

import copy
from collections.abc import Callable, Mapping
from functools import cached_property
from pathlib import Path
from typing import Self, TypeVar

from pydantic import ValidationError

from featurestore.parsing import first_mistake, parse_json
from featurestore.storage.storage import Storage
from serving.bundle.files import LocalFiles, open_vectors
from serving.bundle.log import BundleIdentity, read_version
from serving.bundle.manifest import MODEL, SCHEMA, TRAINED, BundleManifest, VectorsOf
from serving.bundle.rows import BundleIdRows, VectorTable
from serving.errors import BrokenBundleError
from serving.network.served import PORTABLE, ServedNetwork, compiled_name
from serving.problems import Problem
from trainer.config import ModelConfig
from trainer.errors import TrainerError
from trainer.models.layers import used_fields
from trainer.schema.fields import Field, Schema, load_schema

ResultT = TypeVar("ResultT")


class ModelVersion:
    """A version's manifest, its files, the schema and the settings of its model."""

    def __init__(self, storage: Storage, manifest: BundleManifest, cache_dir: Path | None) -> None:
        """Use `open` instead."""
        self.storage, self.manifest, self.cache_dir = storage, manifest, cache_dir
        self.files = LocalFiles(storage, manifest, cache_dir)
        self.schema: Schema = self._checked(SCHEMA, load_schema)
        self.model: ModelConfig = self._checked(
            MODEL, lambda path: ModelConfig.model_validate(parse_json(path.read_bytes()))
        )
        self.fields: tuple[Field, ...] = used_fields(self.schema, self.model)
        """The fields that the model uses."""

    @classmethod
    def open(cls, url: str, version: int | None = None, *, cache_dir: str | Path | None = None) -> Self:
        """Open a version, by default the one in use.

        Files of an object store are copied to `cache_dir` first. Each file that is used is read once and its digest
        compared. Raises BundleNotFoundError, StorageError, and BrokenBundleError, which names the missing or changed
        file.
        """
        storage = Storage(url)
        return cls(storage, read_version(storage, version), Path(cache_dir) if cache_dir else None)

    def vectors_url(self, of: VectorsOf) -> str:
        """Return the address of a vectors store."""
        return self.storage.full(f"{self.manifest.folder}/{of.folder}")

    def _checked(self, name: str, read: Callable[[Path], ResultT]) -> ResultT:
        path = self.files.path(name)
        try:
            return read(path)
        except ValidationError as error:
            raise BrokenBundleError(Problem.OTHER_SETTINGS, path, first_mistake(error)) from error
        except (TrainerError, ValueError) as error:
            raise BrokenBundleError(Problem.WRONG, path, error) from error


class Bundle(ModelVersion):
    """One version of a bundle with one snapshot of each of its vectors stores; close it.

    Everything is read-only and thread-safe; workers on one machine share the mapped memory, which is released with the
    last array that uses it.
    """

    def __init__(self, storage: Storage, manifest: BundleManifest, cache_dir: Path | None) -> None:
        """Use `open` instead; a new object has no vectors until `with_vectors`."""
        super().__init__(storage, manifest, cache_dir)
        names = {each.name for each in manifest.rows} | {each.hashes for each in manifest.tables if each.hashes}
        paths = {name: self.files.path(name) for name in names}
        self.ids = BundleIdRows(manifest.tables, manifest.rows, paths, self.files.path(TRAINED))
        self.vectors: Mapping[str, VectorTable] = {}
        """By the name of their feature store."""

    @classmethod
    def open(
        cls,
        url: str,
        version: int | None = None,
        *,
        vectors: Mapping[str, int] | None = None,
        cache_dir: str | Path | None = None,
    ) -> Self:
        """Open a version, by default the one in use, with these snapshots of its vectors, by default the newest.

        As `ModelVersion.open`; rows of vectors are decoded in `cache_dir`. Raises SnapshotNotFoundError, too."""
        return super().open(url, version, cache_dir=cache_dir).with_vectors(vectors)

    @property
    def identity(self) -> BundleIdentity:
        """The version, and the snapshots of the vectors that are open."""
        return BundleIdentity(self.manifest.version, {name: table.snapshot for name, table in self.vectors.items()})

    @cached_property
    def network(self) -> ServedNetwork:
        """The network, verified and loaded at the first access, in about two seconds. Raises BrokenBundleError.

        Uses code compiled for this machine if the version has it."""
        if self.manifest.file(compiled_name()) is not None:
            self.files.path(compiled_name())
        return ServedNetwork.load(self.files.path(PORTABLE).parent)

    def with_vectors(self, snapshots: Mapping[str, int] | None = None) -> Self:
        """Open these snapshots of the vectors, by default the newest, with the same ID rows and network.

        Either bundle may be closed while the other is used. Raises the same errors as `open`."""
        chosen = snapshots or {}
        other, cache_dir = copy.copy(self), self.cache_dir / "vectors" if self.cache_dir else None
        opened: dict[str, VectorTable] = {}
        try:
            for of in self.manifest.vectors:
                snapshot, _ = open_vectors(self.storage, self.manifest, of, chosen.get(of.store))
                opened[of.store] = VectorTable(of, snapshot, cache_dir)
        except BaseException:
            for table in opened.values():
                table.close()
            raise
        other.vectors = opened
        return other

    def close(self) -> None:
        """Release the vectors; ID rows are released with the last bundle that uses them."""
        for table in self.vectors.values():
            table.close()
