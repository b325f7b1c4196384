"""One version of a bundle: its manifest, schema and settings, without its rows."""

from collections.abc import Callable
from pathlib import Path
from typing import Self, TypeVar

from pydantic import ValidationError

from featurestore.parsing import first_mistake, parse_json
from featurestore.storage.storage import Storage
from serving.bundle.files import LocalFiles
from serving.bundle.log import read_version
from serving.bundle.manifest import MODEL, SCHEMA, BundleManifest, VectorsOf
from serving.errors import BrokenBundleError
from trainer.config.options import ModelConfig
from trainer.errors import TrainerError
from trainer.models.layers import used_fields
from trainer.schema import Field, Schema, load_schema

ResultT = TypeVar("ResultT")


class ModelVersion:
    """A version's manifest, its files, the schema and the settings of its model."""

    def __init__(self, storage: Storage, manifest: BundleManifest, cache_dir: Path | None, verify: bool) -> None:
        """Use `open` instead, except for a version that is not published yet."""
        self.storage, self.manifest, self.cache_dir = storage, manifest, cache_dir
        self.files = LocalFiles(storage, manifest, cache_dir, verify)
        self.schema: Schema = self._checked(SCHEMA, load_schema)
        self.model: ModelConfig = self._checked(MODEL, _read_model)
        self.fields: tuple[Field, ...] = used_fields(self.schema, self.model)
        """The fields that the model uses."""

    @classmethod
    def open(
        cls, url: str, version: int | None = None, *, cache_dir: str | Path | None = None, verify: bool = True
    ) -> Self:
        """Open a version, by default the one in use.

        Files of an object store are copied to `cache_dir` first. With `verify` each file that is used is read once and
        its digest compared. Raises BundleNotFoundError, StorageError, and BrokenBundleError, which names the missing or
        changed file.
        """
        storage = Storage(url)
        return cls(storage, read_version(storage, version), Path(cache_dir) if cache_dir else None, verify)

    def vectors_url(self, of: VectorsOf) -> str:
        """Return the address of a vectors store."""
        return self.storage.full(f"{self.manifest.folder}/{of.folder}")

    def _checked(self, name: str, read: Callable[[Path], ResultT]) -> ResultT:
        path = self.files.path(name)
        try:
            return read(path)
        except ValidationError as error:
            raise BrokenBundleError(f"{path}: {first_mistake(error)}; this code reads other settings") from error
        except (TrainerError, ValueError) as error:
            raise BrokenBundleError(f"{path}: {error}") from error


def _read_model(path: Path) -> ModelConfig:
    return ModelConfig.model_validate(parse_json(path.read_bytes()))
