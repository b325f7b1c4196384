"""What a version of a bundle is made of: one sealed file, whose creation is the publication.

data/models/ctr/
  log/00000000000000000001.json      version 1: this manifest
  use/00000000000000000001.json      the first choice of a version to be served; the last one counts
  bundles/<uuid>/                    the files of a version, which its manifest lists with their digests
    network.pt2                      the network, exported; network-<machine>.pt2: compiled for one kind of machine
    schema.yaml, model.json          the schema with its statistics, and the settings of the model
    ids-12.bin                       the ID rows of all tables of width 12, one table after the other
    ids-<table>.hashes.bin           of an exact table: the hashes of the ids that have rows, ascending
    ids-trained.bin                  a bit for each row of all tables: whether training has touched it
    images.safetensors               the networks E, by which later images get their vectors
    sample.parquet                   some rows of test samples, to measure changes of scores on
    vectors/<store>/                 the visual vectors of all images of a feature store: a store as well
"""

from typing import Annotated, Any, Literal

from pydantic import AfterValidator, Field

from featurestore.spec import Frozen, MissingPolicy, Sealed, SourceSnapshot, StorePath
from serving.bundle import RowDType

BUNDLES, LOG, USE = "bundles", "log", "use"
SCHEMA, MODEL, NETWORK = "schema.yaml", "model.json", "network.pt2"
TRAINED, IMAGES, SAMPLE, VECTORS = "ids-trained.bin", "images.safetensors", "sample.parquet", "vectors"

TableKind = Literal["hashed", "direct", "exact"]
Missing = Literal["zeros", "learned"]


def _name_of_a_file(name: str) -> str:
    if "/" in name:
        raise ValueError(f"{name!r} is no name of a file of a bundle: it has a slash")
    return name


FileName = Annotated[StorePath, AfterValidator(_name_of_a_file)]


class BundleFile(Frozen):
    """One file of a version, below its folder."""

    name: FileName
    bytes: Annotated[int, Field(ge=0)]
    sha256: str


class RowsFile(Frozen):
    """The rows of all tables of one width, and where their bits begin in the file of trained rows."""

    width: int
    name: FileName
    num_rows: int
    first_bit: int


class TableRows(Frozen):
    """One ID table in the file of its width, from `first_row` on, shard by shard.

    hashed: splitmix64 of the id; its top bits are the shard, the remainder of its lower 32 bits the row in the shard.
    direct: id modulo num_shards is the shard, the quotient the row. exact: row 0 of each shard is the cold row, which
    is used for ids without a row; after it come the rows of the shard's hashes, ascending.
    """

    name: str
    kind: TableKind
    width: int
    num_shards: int
    rows_per_shard: int
    """0 for exact tables, whose shards differ."""
    num_rows: int
    first_row: int
    hashes: FileName | None = None


class NetworkColumns(Frozen):
    """Where in a row of a vectors store the visual vector of one E is, and what replaces a missing image's."""

    name: str
    start: int
    width: int
    no_image: tuple[float, ...]


class VectorsOf(Frozen):
    """The vectors store of one feature store; of which snapshot its rows are, its own manifests say."""

    store: str
    """Name of the feature store in the schema."""
    folder: StorePath
    """Of the vectors store, in the version's folder."""
    source: SourceSnapshot
    """The feature store and the snapshot at the export."""
    features: str
    """Digest of the kind of features that the networks E were trained on."""
    store_id: str
    """Of the vectors store."""
    networks: tuple[NetworkColumns, ...]
    signatures: bool
    """Whether 32 columns with the 512 bits of each image's signature follow."""


class ScoreError(Frozen):
    """How far logits move by something, on a sample of inputs: the ID rows' type, or a publish of vectors."""

    inputs: Literal["test samples", "drawn ids"] = "test samples"
    num_scores: int
    worst: float
    mean: float


class BundleManifest(Sealed):
    """One version of a bundle."""

    version: Annotated[int, Field(ge=1)]
    bundle_id: str
    """Random: the name of its folder."""
    time_s: float
    writer: str
    run: str
    checkpoint: str
    checkpoint_digest: str
    hash: Literal["splitmix64"] = "splitmix64"
    id_dtype: RowDType
    id_error: ScoreError | None
    """Of other types than float32: measured against float32 rows."""
    rows: tuple[RowsFile, ...]
    tables: tuple[TableRows, ...]
    vectors: tuple[VectorsOf, ...]
    missing: Missing
    missing_in_training: MissingPolicy
    """error: the model has never met an image without a vector; such images are zeros when it is served."""
    metrics: dict[str, Any]
    """Of the run, as its report has them."""
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

    choice: Annotated[int, Field(ge=1)]
    version: Annotated[int, Field(ge=1)]
    time_s: float
    writer: str
    nonce: str
    """Random, so that no other writer's choice has the same bytes."""
