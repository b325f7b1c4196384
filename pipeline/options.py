"""The options of jobs, each said once: its name, its default, its limits and its help; a command gets one object."""

import inspect
from collections.abc import Callable
from dataclasses import MISSING, dataclass, fields
from typing import Annotated, Any, Literal, TypeVar, get_type_hints

import typer
from typer.models import ParameterInfo

from featurestore.console.commandline import power_of_two
from pipeline.network import DEFAULT_BACKBONE

Options = TypeVar("Options")

StoreDType = Literal["bfloat16", "float16", "float32", "int8"]
DTypeOption = Annotated[
    StoreDType | None,
    typer.Option(
        help="In which the store keeps features; int8 only where the store is that already.",
        show_default="the store's; bfloat16 in a new one",
    ),
]
ImagesOption = Annotated[
    str, typer.Option(help="Folder or fsspec address of images, or a .parquet or .csv with key or id, and uri.")
]
NewStoreOption = Annotated[str, typer.Option(help="Folder or address of the feature store; made when it is new.")]
NumShardsOption = Annotated[
    int | None,
    typer.Option(min=1, max=65536, callback=power_of_two, help="Of a new store, a power of two.", show_default="64"),
]
NameOption = Annotated[str | None, typer.Option(help="Of the feature, in a new store.", show_default="feature")]
BatchOption = Annotated[int, typer.Option(min=1, max=4096, help="Images per pass of the network.")]
PartOption = Annotated[
    int, typer.Option(min=1, max=65536, help="Images per task; what is in flight is repeated after a kill.")
]


def takes(kind: Callable[..., Options]) -> Callable[[Callable[[Options], None]], Callable[..., None]]:
    """Make a command of a function of one object: its options are the fields of the dataclass `kind` with a help."""
    hints = {
        name: hint
        for name, hint in get_type_hints(kind, include_extras=True).items()
        if any(isinstance(about, ParameterInfo) for about in getattr(hint, "__metadata__", ()))
    }
    defaults = {field.name: field.default for field in fields(kind)}  # type: ignore[arg-type]
    parameters = [
        inspect.Parameter(
            name,
            inspect.Parameter.KEYWORD_ONLY,
            default=inspect.Parameter.empty if defaults[name] is MISSING else defaults[name],
            annotation=hint,
        )
        for name, hint in hints.items()
    ]

    def decorate(function: Callable[[Options], None]) -> Callable[..., None]:
        def command(**values: Any) -> None:
            function(kind(**values))

        command.__name__, command.__doc__, command.__annotations__ = function.__name__, function.__doc__, hints
        command.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
        return command

    return decorate


@dataclass(frozen=True, kw_only=True)
class ExtractOptions:
    """What to extract, and how. `num_shards` and `name` count when the store is made."""

    images: ImagesOption = "data/images"
    store: NewStoreOption = "data/features"
    backbone: Annotated[
        str,
        typer.Option(
            metavar="MODEL:LAYER", help="A torchvision classifier and the layer to keep; a wrong one lists good ones."
        ),
    ] = DEFAULT_BACKBONE
    weights: Annotated[
        str,
        typer.Option(
            help="imagenet (downloaded once), imagenet:ENTRY such as imagenet:IMAGENET1K_V2, a file with the model's"
            " state dict, or random:SEED."
        ),
    ] = "imagenet"
    dtype: DTypeOption = None
    compute_dtype: Annotated[
        Literal["auto", "bfloat16", "float32"],
        typer.Option(help="In which the network computes; auto is bfloat16 where all workers have it in hardware."),
    ] = "auto"
    batch_size: BatchOption = 16
    part_size: PartOption = 256
    num_shards: NumShardsOption = None
    name: NameOption = None


@dataclass(frozen=True, kw_only=True)
class RefreshOptions:
    """What to refresh, and how. What is None is as the store has it."""

    images: ImagesOption = "data/images"
    store: Annotated[str, typer.Option(help="Folder or address of a feature store that is there.")] = "data/features"
    backbone: Annotated[
        str | None, typer.Option(metavar="MODEL:LAYER", help="The store's network.", show_default="as in extraction")
    ] = None
    weights: Annotated[
        str | None,
        typer.Option(help="The store's weights: imagenet, random:SEED or a file.", show_default="as in extraction"),
    ] = None
    compute_dtype: Annotated[
        Literal["bfloat16", "float32"] | None,
        typer.Option(help="In which the network computes; it must be the store's.", show_default="the store's"),
    ] = None
    batch_size: BatchOption = 16
    part_size: PartOption = 256
    keep_missing: Annotated[
        bool, typer.Option("--keep-missing", help="Keep the features of images that are not listed any more.")
    ] = False
    max_gone: Annotated[
        float, typer.Option(min=0, max=1, help="Refuse when more than this share of the store would vanish.")
    ] = 0.5
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Read and decode what is new, print the counts, write nothing.")
    ] = False


@dataclass(frozen=True, kw_only=True)
class ImportOptions:
    """What to import, and how. `num_shards`, `name` and `dtype` count for a new store; None: as it has them."""

    address: Annotated[
        str,
        typer.Option(
            "--from", help="A .parquet file or a folder of them, a .npy matrix, or a folder of XDL's data.0, data.1 …"
        ),
    ]
    store: NewStoreOption = "data/features"
    name: NameOption = None
    origin: Annotated[
        str | None, typer.Option("--source", help="What made the vectors, in words; another one is refused later.")
    ] = None
    file_format: Annotated[
        Literal["auto", "parquet", "npy", "xdl"], typer.Option("--format", help="auto goes by the names of the files.")
    ] = "auto"
    keys: Annotated[str | None, typer.Option(help="Of a .npy matrix: .npy of int64, or a text file of ids.")] = None
    dim: Annotated[
        int | None, typer.Option(min=1, help="Numbers per vector, for XDL and for lists.", show_default="4096 for XDL")
    ] = None
    feature_column: Annotated[str | None, typer.Option(help="Of Parquet.", show_default="the only one")] = None
    binary_dtype: Annotated[
        Literal["bfloat16", "float16", "float32"] | None,
        typer.Option(help="Of fixed-size binary in Parquet; bfloat16 for uint16 bits in .npy."),
    ] = None
    dtype: DTypeOption = None
    num_shards: NumShardsOption = None
    part_size: Annotated[int | None, typer.Option(min=1, help="Rows per task.", show_default="32 MB of them")] = None
    keep_missing: Annotated[
        bool, typer.Option("--keep-missing/--drop-missing", help="Rows of the store that the source does not have.")
    ] = True
    max_gone: Annotated[float, typer.Option(min=0, max=1, help="Share of the store that --drop-missing may drop.")] = (
        0.5
    )
