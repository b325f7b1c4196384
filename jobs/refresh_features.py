"""Bring a feature store up to date with its images: new, changed and vanished ones, in one commit."""

from featurestore.console import commandline, output
from pipeline.options import RefreshOptions, takes_on_cluster

EXAMPLES = """Examples:
  crossmedia refresh --images s3://shop/photos --store s3://shop/features
  crossmedia refresh --images photos --store data/features --channel candidate
  crossmedia refresh --images half-of-them --store data/features --keep-missing
"""

app = commandline.CommandApp(report=True, rich_markup_mode="rich", stopped=commandline.CONTINUES)


@app.command(epilog=EXAMPLES)
@takes_on_cluster(RefreshOptions)
def main(options: RefreshOptions) -> None:
    """Bring a feature store up to date with its images, in one commit.

    Images are compared by etag, or size and date, then by the digest of their bytes; only new and changed ones go
    through the network. Features of images that are not listed any more are removed. Images that cannot be read or
    decoded are kept in quarantine and tried again by the next run. A killed run continues when the same command
    runs again.
    """
    from pipeline.cluster.tasks import connect
    from pipeline.features.refresh import refresh

    # One process with all cores for the network: copies of the network would share the same cores.
    with connect(workers=1, threads_per_worker=1) as client:
        summary = refresh(options, client)
    output.print_summary(str(summary))


if __name__ == "__main__":
    commandline.run_app(app)
