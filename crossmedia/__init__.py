"""CrossMedia from Python: `import crossmedia as cm`.

    store = cm.extract("photos", "data/features")
    store["bag/1.jpg"]  # float32, (4096,)
    cm.build_samples("data/logs", "data/samples")
    run = cm.train("data/samples", images="both")
    run.evaluate().table
    run.score(impressions, behaviors)
    run.publish("data/models/ctr").score(rows)
    cm.Client("http://127.0.0.1:8080").score(rows)

Each name stands for what the command of the same name does, and errors have the same texts. Tables are pandas
DataFrames, Arrow tables, or dicts of columns (lists, numpy arrays, torch tensors).
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from crossmedia.data import build_samples, extract, make_demo
    from crossmedia.datasets import FeatureDataset, SampleDataset
    from crossmedia.models import Client, Model, load_model
    from crossmedia.runs import Run, open_run, train
    from crossmedia.store import Store, open_store
    from pipeline.samples.requests import with_behaviors
    from trainer.evaluation.bootstrap import Evaluation

_MODULES = {
    "crossmedia.data": ("build_samples", "extract", "make_demo"),
    "crossmedia.models": ("Client", "Model", "load_model"),
    "crossmedia.runs": ("Run", "open_run", "train"),
    "crossmedia.store": ("Store", "open_store"),
    "pipeline.samples.requests": ("with_behaviors",),
    "crossmedia.datasets": ("FeatureDataset", "SampleDataset"),
    "trainer.evaluation.bootstrap": ("Evaluation",),
}
__all__ = [
    "Client", "Evaluation", "FeatureDataset", "Model", "Run", "SampleDataset", "Store", "build_samples", "extract",
    "load_model", "make_demo", "open_run", "open_store", "train", "with_behaviors",
]  # fmt: skip


def __getattr__(name: str) -> Any:
    """Load the module of a public name when it is asked for first."""
    for module, names in _MODULES.items():
        if name in names:
            return getattr(importlib.import_module(module), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    """List the public names, for completion in a notebook."""
    return __all__
