"""Make the inputs of a training: the demo's pictures and logs, a feature store of images, samples of logs."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from crossmedia.store import Store


def make_demo(out: str | Path = "data", **options: Any) -> Path:
    """Draw the demo's images and logs as `crossmedia demo-data`, and return their folder.

    `options`: those of the command, as items=60, users=400, days=5. Raises DemoError.
    """
    from pipeline.demo.make import make_demo
    from pipeline.options import DemoOptions

    make_demo(DemoOptions(out=Path(out), **options))
    return Path(out)


def extract(images: str | Path, store: str | Path = "data/features", **options: Any) -> "Store":
    """Compute the feature of every image once, as `crossmedia extract`, and open the store at its newest snapshot.

    `options`: those of the command, as backbone="resnet18:avgpool", weights="random:0", num_shards=4. It runs on the
    cluster of Dask's configuration, else in one process of this machine. Raises UserError.
    """
    from crossmedia.store import open_store
    from pipeline.cluster.tasks import connect
    from pipeline.features.refresh import extract
    from pipeline.options import ExtractOptions

    with connect(workers=1, threads_per_worker=1) as client:
        extract(ExtractOptions(images=str(images), store=str(store), **options), client)
    return open_store(store)


def build_samples(
    logs: Any, samples: str | Path = "data/samples", *, label: str | None = None, **options: Any
) -> dict[str, Any]:
    """Make the trainer's input of logs, as `crossmedia samples`, and return the counts of summary.json.

    `logs`: their folder or address; or a DataFrame of pandas or an Arrow table, or several by name, as {"shown": ...,
    "products": ...}: these are written to the folder SAMPLES-logs as Parquet, and take the place of those before.
    Without the option `mapping`, the mapping.yaml there counts, guessed where it is not there yet (`label`: the column
    of clicks): read and correct it. `options`: as window_days=7. It runs where `extract` does. Raises UserError.
    """
    from pipeline.cluster.tasks import connect
    from pipeline.options import SampleOptions
    from pipeline.samples.build import build_samples as build
    from trainer.schema.suggest import written_logs

    if not isinstance(logs, str | Path):
        with written_logs(logs, Path(f"{samples}-logs"), label) as (folder, mapping):
            return build_samples(folder, samples, **{"mapping": str(mapping)} | options)
    with connect() as client:
        return build(SampleOptions(logs=str(logs), samples=str(samples), **options), client)
