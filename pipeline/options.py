"""The options of jobs, each said once: its name, its default, its limits and its help; a command gets one object."""

import functools
import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

import click
import typer

from featurestore.console.commandline import on_this_machine, power_of_two, takes
from featurestore.text import DType
from pipeline.cluster.submit import cluster_of_job, submit
from pipeline.network import DEFAULT_BACKBONE, PrecisionName

Options = TypeVar("Options")

DEFAULT_IMAGES, DEFAULT_STORE, DEFAULT_SAMPLES = "data/images", "data/features", "data/samples"
LONGEST_DAYS = 36_500
XDL_DIM = 4096  # numbers of an image in the files of XDL's example

_OF_CLUSTER = ("scheduler", "scheduler_file", "workers", "threads_per_worker", "memory_limit")
"""Options of dask-submit that its jobs have as well."""

DTypeOption = Annotated[
    DType | None,
    typer.Option(help="Float type of the stored features.", show_default="the store's; bfloat16 in a new one"),
]
ImagesOption = Annotated[
    str, typer.Option(help="Folder or fsspec address of images, or a .parquet or .csv with key or id, and uri.")
]
NewStoreOption = Annotated[str, typer.Option(help="Folder or address of the feature store; made when it is new.")]
NumShardsOption = Annotated[
    int | None,
    typer.Option(
        min=1, max=65536, callback=power_of_two, help="Shards of a new store; a power of two.", show_default="64"
    ),
]
NameOption = Annotated[str | None, typer.Option(help="Name of the feature in a new store.", show_default="feature")]
BatchOption = Annotated[int, typer.Option(min=1, max=4096, help="Images per pass of the network.")]
ChannelOption = Annotated[
    str | None,
    typer.Option(
        metavar="NAME", help="Let this channel of the store, such as candidate, point to the snapshot that is made."
    ),
]
PartOption = Annotated[
    int, typer.Option(min=1, max=65536, help="About as many images a task; what is in flight is repeated after a kill.")
]


def takes_on_cluster(kind: Callable[..., Options]) -> Callable[[Callable[[Options], None]], Callable[..., None]]:
    """Make a command as `takes` does, with options that name a Dask cluster, which the function then finds."""
    of_cluster = {
        str(each.name): each for each in submit.params if isinstance(each, click.Option) and each.name in _OF_CLUSTER
    }
    parameters = []
    for name, each in of_cluster.items():  # dask-submit checks their texts later
        about = typer.Option(*each.opts, metavar=each.metavar, help=each.help, rich_help_panel="Dask cluster")
        hint = Annotated[str | None, about]
        parameters.append(inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=hint))

    def decorate(function: Callable[[Options], None]) -> Callable[..., None]:
        command = takes(kind)(function)

        @functools.wraps(command)
        def on_cluster(**values: Any) -> None:
            given = {option: values.pop(name) for name, option in of_cluster.items()}
            words = [word for option, value in given.items() if value is not None for word in (option.opts[-1], value)]
            with _cluster(words) if words else nullcontext():
                command(**values)

        on_cluster.__annotations__ = command.__annotations__ | {each.name: each.annotation for each in parameters}
        on_cluster.__signature__ = inspect.Signature(  # type: ignore[attr-defined]
            [*inspect.signature(command).parameters.values(), *parameters]
        )
        return on_cluster

    return decorate


@contextmanager
def _cluster(words: list[str]) -> Iterator[None]:
    """Prepare the cluster of these options. Raises BadParameter, ClusterError."""
    try:
        with cluster_of_job(words):
            yield
    except click.UsageError as error:
        hint = error.param.opts[-1] if isinstance(error, click.BadParameter) and error.param else "--scheduler"
        raise typer.BadParameter(error.message, param_hint=hint) from error


@dataclass(frozen=True, kw_only=True)
class ExtractOptions:
    """Options of an extraction. `num_shards` and `name` count when the store is made."""

    images: ImagesOption = DEFAULT_IMAGES
    store: NewStoreOption = DEFAULT_STORE
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
    precision: Annotated[
        Literal["auto", PrecisionName],
        typer.Option(
            help="Number type of the network's products. auto: the store's; for a new one bfloat16 where all"
            " workers' hardware is quick at it, else float32. int8 is calibrated on some of the images."
        ),
    ] = "auto"
    least_cosine: Annotated[
        float, typer.Option(min=-1, max=1, help="Refuse int8 where its features have a smaller one with float32's.")
    ] = 0.99
    batch_size: BatchOption = 16
    part_size: PartOption = 256
    num_shards: NumShardsOption = None
    name: NameOption = None
    channel: ChannelOption = None


@dataclass(frozen=True, kw_only=True)
class RefreshOptions:
    """Options of a refresh. None: as the store has it."""

    images: ImagesOption = DEFAULT_IMAGES
    store: Annotated[str, typer.Option(help="Folder or address of a feature store that is there.")] = DEFAULT_STORE
    weights: Annotated[
        str | None,
        typer.Option(help="The store's weights: imagenet, random:SEED or a file.", show_default="the store's"),
    ] = None
    batch_size: BatchOption = 16
    part_size: PartOption = 256
    keep_missing: Annotated[
        bool, typer.Option("--keep-missing", help="Keep the features of images that are not listed any more.")
    ] = False
    max_gone: Annotated[
        float, typer.Option(min=0, max=1, help="Refuse when more than this share of the store would vanish.")
    ] = 0.5
    channel: ChannelOption = None


@dataclass(frozen=True, kw_only=True)
class ImportOptions:
    """Options of an import. `num_shards`, `name` and `dtype` count for a new store; None: as it has them."""

    address: Annotated[
        str,
        typer.Option(
            "--from", help="A .parquet file or a folder of them, a .npy matrix, or a folder of XDL's data.0, data.1 …"
        ),
    ]
    store: NewStoreOption = DEFAULT_STORE
    name: NameOption = None
    origin: Annotated[
        str | None, typer.Option("--source", help="Name of the vectors' origin; later imports must give the same.")
    ] = None
    keys: Annotated[str | None, typer.Option(help="Keys of a .npy matrix: a .npy of int64, or a text file of ids.")] = (
        None
    )
    dim: Annotated[
        int | None,
        typer.Option(
            min=1, max=1 << 20, help="Numbers per vector, for XDL and for lists.", show_default=f"{XDL_DIM} for XDL"
        ),
    ] = None
    feature_column: Annotated[
        str | None, typer.Option(help="Parquet column of the vectors.", show_default="the only one")
    ] = None
    dtype: DTypeOption = None
    num_shards: NumShardsOption = None
    part_size: Annotated[int | None, typer.Option(min=1, help="Rows per task.", show_default="32 MB of them")] = None


@dataclass(frozen=True, kw_only=True)
class SampleOptions:
    """Options of the samples. Times are in UTC."""

    logs: Annotated[str, typer.Option(help="Folder or address with impressions/*.parquet and behaviors/*.parquet.")] = (
        "data/logs"
    )
    samples: Annotated[
        str,
        typer.Option(
            help="Folder to write, on a disk that all workers see, or an address, as s3://shop/samples; samples there "
            "are replaced."
        ),
    ] = DEFAULT_SAMPLES
    window_days: Annotated[
        float, typer.Option(min=0, max=LONGEST_DAYS, help="Days before an impression whose behaviours count.")
    ] = 14
    min_dwell_s: Annotated[
        float, typer.Option(min=0, max=LONGEST_DAYS * 86_400, help="Seconds that a behaviour has to last.")
    ] = 5
    max_behaviors: Annotated[int, typer.Option(min=1, max=1_000_000, help="Newest behaviours of a group to keep.")] = 50
    test_days: Annotated[int, typer.Option(min=0, max=LONGEST_DAYS, help="Last days of the logs, for testing.")] = 1
    test_from: Annotated[
        str | None, typer.Option(help="First day for testing, as 2026-03-20, in place of --test-days.")
    ] = None
    test_share: Annotated[
        float | None,
        typer.Option(
            min=0.001, max=0.999, help="Share of the newest groups for testing, in whole days, in place of --test-days."
        ),
    ] = None
    behavior_age: Annotated[
        bool,
        typer.Option(
            "--behavior-age",
            help="Add the column behavior_age: seconds from each behaviour to the first impression of its group.",
        ),
    ] = False
    mapping: Annotated[
        str | None,
        typer.Option(
            help="YAML file that says how your own tables are called, CSV or Parquet; crossmedia schema inspect "
            "LOGS writes a first one."
        ),
    ] = None
    partitions: Annotated[
        int | None,
        typer.Option(min=1, max=65536, help="Buckets of users, one task each; the samples do not change with it."),
    ] = None
    days: Annotated[
        str | None,
        typer.Option(
            help="Build or rebuild only these days, as 2026-03-20,2026-03-21; the samples keep all others.",
            show_default="all",
        ),
    ] = None
    since: Annotated[
        str | None,
        typer.Option(help="Make only the days from this one on that the samples do not have.", show_default="all"),
    ] = None
    scratch: Annotated[
        str | None,
        typer.Option(
            help="For an address: folder for files in between, on a disk that all workers see.",
            show_default="the system's temporary folder",
        ),
    ] = None
    keep_days: Annotated[
        float,
        typer.Option(
            min=1, max=LONGEST_DAYS, help="For an address: days for which replaced files stay for those who read them."
        ),
    ] = 7
    midnight_pause_s: int = 3_600
    latest_s: int | None = None  # rows later than this are refused; None: a day from now
    groups_per_file: int = 131_072


@dataclass(frozen=True, kw_only=True)
class XdlOptions:
    """Options of an import of XDL's text samples: which ones, and how."""

    source: Annotated[str, typer.Option("--from", help="File or folder of lines skey|gkey|user part|ad part|label|ts.")]
    samples: Annotated[
        str, typer.Option(help="Folder to write, on a disk that all workers see, or an address; replaced.")
    ]
    test_share: Annotated[
        float, typer.Option(min=0, max=0.9, help="Share of the groups of --from to test on, by their key's hash.")
    ] = 0.1
    label_threshold: Annotated[float | None, typer.Option(help="Labels from here on are clicks.")] = None


@dataclass(frozen=True, kw_only=True)
class DemoOptions:
    """Options of the demo data; with `images` all readable photographs of that folder are the items."""

    out: Annotated[
        Path, typer.Option(help="Folder to write: images, logs and demo.json.", callback=on_this_machine)
    ] = Path("data")
    items: Annotated[int | None, typer.Option(min=20, help="Clothes to draw.", show_default="1400")] = None
    users: Annotated[int | None, typer.Option(min=10, help="People to simulate.", show_default="8000")] = None
    days: Annotated[int, typer.Option(min=2, max=366, help="Days of the log; the last is the test day.")] = 19
    seed: Annotated[int, typer.Option(min=0, help="Equal seeds give equal bytes.")] = 0
    small: Annotated[bool, typer.Option("--small", help="200 clothes and 1500 people: quick, and noisy.")] = False
    images: Annotated[
        Path | None, typer.Option(help="Folder of your own photographs, in place of drawn clothes; nothing is copied.")
    ] = None
    labels: Annotated[
        Path | None, typer.Option(help="CSV with the columns image and label: the photographs' categories.")
    ] = None
    force: Annotated[bool, typer.Option("--force", help="Replace a demo made with other options.")] = False

    @property
    def num_items(self) -> int:
        """Clothes to draw."""
        return self.items or (200 if self.small else 1400)

    @property
    def num_users(self) -> int:
        """People to simulate."""
        return self.users or (1500 if self.small else 8000)
