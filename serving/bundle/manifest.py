"""The manifest of a bundle's version: one sealed file, log/N.json, whose creation publishes the version.

docs/SERVE.md has the tree of a model's folder. The files of a version are below bundles/<uuid>; its manifest lists them
with their digests.
"""

from typing import Annotated, Any, Literal

from pydantic import Field

from featurestore.spec import FileName, Frozen, MissingPolicy, RandomId, Sealed, SourceSnapshot, StorePath, Version

BUNDLES, LOG, USE, LEAVING = "bundles", "log", "use", "leaving"
SCHEMA, MODEL, NETWORK = "schema.yaml", "model.json", "network.pt2"
TRAINED, IMAGES, SAMPLE, VECTORS = "ids-trained.bin", "images.safetensors", "sample.parquet", "vectors"

TableKind = Literal["hashed", "direct", "exact"]
Missing = Literal["zeros", "learned"]
Count = Annotated[int, Field(ge=0)]
Width = Annotated[int, Field(ge=1)]


class BundleFile(Frozen):
    """One file of a version, below its folder."""

    name: FileName
    bytes: Count
    sha256: str


class RowsFile(Frozen):
    """The rows of all tables of one width, and where their bits begin in the file of trained rows.

    That file has one bit for each row of all tables: whether training has touched it."""

    width: Width
    name: FileName
    num_rows: Count
    first_bit: Annotated[int, Field(ge=0, multiple_of=8)]


class TableRows(Frozen):
    """One ID table in the file of its width, from `first_row` on, shard by shard.

    hashed: splitmix64 of the id; its top bits are the shard, the remainder of its lower 32 bits the row in the shard,
    of which all have equally many.
    direct: id modulo num_shards is the shard, the quotient the row. exact: row 0 of each shard is the cold row, which
    is used for ids without a row; after it come the rows of the shard's hashes, ascending.
    """

    name: str
    kind: TableKind
    width: Width
    num_shards: Annotated[int, Field(ge=1)]
    num_rows: Count
    first_row: Count
    hashes: FileName | None = None
    """Of an exact table: the file of the hashes of the ids that have rows, ascending."""


class VectorsOf(Frozen):
    """The vectors store of one feature store. Its own manifests name the snapshot that its rows are computed from."""

    store: str
    """Name of the feature store in the schema."""
    folder: StorePath
    """Folder of the vectors store, below the version's folder."""
    source: SourceSnapshot
    """The feature store and the snapshot at the export."""
    features: str
    """Digest of the kind of features that E was trained on."""
    store_id: RandomId
    """Id of the vectors store."""
    no_image: tuple[float, ...]
    """The vector for missing images, as wide as a row."""


class BundleManifest(Sealed):
    """One version of a bundle."""

    version: Annotated[Version, Field(ge=1)]
    bundle_id: RandomId
    """Random: the name of its folder."""
    time_s: float
    writer: str
    run: str
    checkpoint: str
    checkpoint_digest: str
    hash: Literal["splitmix64"] = "splitmix64"
    rows: tuple[RowsFile, ...]
    tables: tuple[TableRows, ...]
    vectors: tuple[VectorsOf, ...]
    missing: Missing
    missing_in_training: MissingPolicy
    """error: training had no image without a vector; when the model is served, such images count as zeros."""
    metrics: dict[str, Any]
    """Metrics from the run's report."""
    files: tuple[BundleFile, ...]

    def file(self, name: str) -> BundleFile | None:
        """Return the file of that name, if the version has it."""
        return next((file for file in self.files if file.name == name), None)

    @property
    def folder(self) -> str:
        """The version's folder, relative to the bundle's address."""
        return f"{BUNDLES}/{self.bundle_id}"


class Choice(Sealed):
    """use/N.json: which version is served from then on."""

    choice: Annotated[Version, Field(ge=1)]
    version: Annotated[Version, Field(ge=1)]
    time_s: float
    writer: str
    nonce: RandomId
    """Random, so that no other writer's choice has the same bytes."""
