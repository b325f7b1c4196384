"""Compute the feature of every image once, into the feature store."""

import warnings
from typing import Annotated, Literal

import typer

from featurestore.console.commandline import CONTINUES, CommandApp, power_of_two, run_app
from pipeline.network import DEFAULT_BACKBONE

EXAMPLES = """Examples:

\b
python jobs/extract_features.py --images photos --weights imagenet
dask-submit -n 4 jobs/extract_features.py --images s3://shop/photos --store s3://shop/features
python jobs/extract_features.py --images catalogue.parquet --weights random:0
python jobs/extract_features.py --backbone resnet50:avgpool --store data/features-resnet50
"""

BackboneOption = Annotated[
    str,
    typer.Option(
        metavar="MODEL:LAYER", help="A torchvision classifier and the layer to keep; a wrong one lists good ones."
    ),
]
WeightsOption = Annotated[
    str,
    typer.Option(
        help="imagenet (downloaded once), imagenet:ENTRY such as imagenet:IMAGENET1K_V2, a file with the model's"
        " state dict, or random:SEED."
    ),
]
DTypeOption = Annotated[
    Literal["bfloat16", "float16", "float32", "int8"] | None,
    typer.Option(
        help="In which the store keeps features; int8 only where the store is that already.",
        show_default="the store's; bfloat16 in a new one",
    ),
]

app = CommandApp(rich_markup_mode="rich", stopped=CONTINUES)


@app.command(epilog=EXAMPLES)
def main(
    images: Annotated[
        str, typer.Option(help="Folder or fsspec address of images, or a .parquet or .csv with key or id, and uri.")
    ] = "data/images",
    store: Annotated[str, typer.Option(help="Folder or address of the feature store; made when it is new.")] = (
        "data/features"
    ),
    backbone: BackboneOption = DEFAULT_BACKBONE,
    weights: WeightsOption = "imagenet",
    dtype: DTypeOption = None,
    compute_dtype: Annotated[
        Literal["auto", "bfloat16", "float32"],
        typer.Option(help="In which the network computes; auto is bfloat16 where all workers have it in hardware."),
    ] = "auto",
    batch_size: Annotated[int, typer.Option(min=1, max=4096, help="Images per pass of the network.")] = 16,
    part_size: Annotated[
        int, typer.Option(min=1, max=65536, help="Images per task; what is in flight is repeated after a kill.")
    ] = 256,
    num_shards: Annotated[
        int | None,
        typer.Option(
            min=1, max=65536, callback=power_of_two, help="Of a new store, a power of two.", show_default="64"
        ),
    ] = None,
    name: Annotated[str | None, typer.Option(help="Of the feature, in a new store.", show_default="feature")] = None,
) -> None:
    """Compute the feature of every image once, into the feature store.

    Images that cannot be read or decoded are kept in the store's quarantine with the reason. A killed run continues
    when the same command runs again; images that are unchanged in the store are not computed again.
    """
    from pipeline.cluster.connect import connect
    from pipeline.features.extract import ExtractOptions, extract
    from pipeline.network.weights import UntrainedWeightsWarning, check_network

    options = ExtractOptions(
        images=images,
        store=store,
        backbone=backbone,
        weights=weights,
        dtype=dtype,
        compute_dtype=compute_dtype,
        batch_size=batch_size,
        part_size=part_size,
        num_shards=num_shards,
        name=name,
    )
    if weights.startswith("random:"):
        typer.secho(f"warning: the weights {weights} are NOT pretrained", fg="yellow", bold=True, err=True)
    check_network(backbone, weights)
    # One process with all cores for the network: copies of the network would share the same cores.
    with warnings.catch_warnings(), connect(workers=1, threads_per_worker=1) as client:
        warnings.simplefilter("ignore", UntrainedWeightsWarning)  # said above
        summary = extract(options, client)
    typer.echo(summary)


if __name__ == "__main__":
    run_app(app)
