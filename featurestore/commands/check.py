"""verify: is every file what was written?"""

import sys

import typer

from featurestore.commands.common import Url, Version, progress_bar, user_errors
from featurestore.store import FeatureStore
from featurestore.verify import verify as verify_store

app = typer.Typer()


@app.command(epilog="Example: `python -m featurestore verify s3://bucket/features`")
def verify(url: Url, version: Version = None) -> None:
    """Check every file of a snapshot, and all manifests. Exit code 1 when one is broken."""
    with user_errors():
        store = FeatureStore.open(url)
        with progress_bar() as progress:
            report = verify_store(store, version, progress)
    for problem in report.problems:
        sys.stderr.write(f"broken: {problem}\n")
    looked_at = f"{report.num_manifests:,} manifests, {report.num_files:,} files, {report.num_bytes:,} bytes"
    sys.stdout.write(f"{len(report.problems)} problems in {looked_at}\n")
    raise typer.Exit(1 if report.problems else 0)
