"""Compute the feature of every image once, into the feature store."""

from featurestore.console import commandline, output
from pipeline.options import ExtractOptions, takes_on_cluster

EXAMPLES = """Examples:
  crossmedia extract --images photos --weights imagenet
  crossmedia extract --images s3://shop/photos --store s3://shop/features -n 4
  crossmedia extract --images catalogue.parquet --weights random:0
  crossmedia extract --backbone resnet50:avgpool --store data/features-resnet50
  crossmedia extract --images all-photos --store data/features-256
"""

app = commandline.CommandApp(report=True, rich_markup_mode="rich", stopped=commandline.CONTINUES)


@app.command(epilog=EXAMPLES)
@takes_on_cluster(ExtractOptions)
def main(options: ExtractOptions) -> None:
    """Compute the feature of every image once, into the feature store.

    Images that cannot be read or decoded are kept in the store's quarantine with the reason. A killed run continues
    when the same command runs again; images that are unchanged in the store are not computed again.
    """
    from pipeline.cluster.tasks import connect
    from pipeline.features.refresh import extract
    from pipeline.network.backbone import check_network

    check_network(options.backbone, options.weights)
    # One process with all cores for the network: copies of the network would share the same cores.
    with connect(workers=1, threads_per_worker=1) as client:
        summary = extract(options, client)
    output.print_summary(str(summary))


if __name__ == "__main__":
    commandline.run_app(app)
