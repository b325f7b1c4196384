"""One run of a FuxiCTR model, in its own environment: its classes, its loop, its optimiser; scores after each epoch.

python -m benchmarks.quality.fuxi SPEC.json RESULT.json

The models are those of its package that take behaviours and ad as equals (model_zoo.LongCTR): DIN, DCNv2 and FinalMLP,
and DNN, which is its DCNv2 without a cross layer. Two things are quicker here than in the package. Its loader looks up
pandas rows one by one; here the same tensors are taken from arrays, a batch at a time. Its `PretrainedEmbedding`
projects the features of each occurrence; here the table is projected, then looked up: the same numbers and gradients.
"""

import json
import math
import sys
import tempfile
import time
from collections import OrderedDict
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from fuxictr.features import FeatureMap
from fuxictr.pytorch.layers.embeddings.pretrained_embedding import PretrainedEmbedding
from fuxictr.pytorch.torch_utils import seed_everything
from model_zoo.LongCTR.DCNv2.DCNv2 import DCNv2
from model_zoo.LongCTR.DIN.DIN import DIN
from model_zoo.LongCTR.FinalMLP.FinalMLP import FinalMLP
from numpy.typing import NDArray

from benchmarks.quality.rows import PADDING, Layout, Rows, Vocabulary, read, vocabularies, write_pretrained
from benchmarks.quality.runs import Spec
from featurestore import FeatureStore
from trainer.evaluation.bootstrap import measure
from trainer.schema.fields import Field, load_schema

_PLAIN = {"optimizer": "adam", "loss": "binary_crossentropy", "task": "binary_classification", "metrics": ["AUC"]}
Tensors = tuple[dict[str, torch.Tensor], dict[str, torch.Tensor], torch.Tensor]


class Loader:
    """Batches of rows in the form of FuxiCTR's LongCTRDataLoader: (fields and label, ads behind histories, mask)."""

    def __init__(self, rows: Rows, batch_size: int, shuffle: bool) -> None:
        self._rows, self._batch_size, self._shuffle = rows, batch_size, shuffle

    def __len__(self) -> int:
        return math.ceil(len(self._rows.label_B) / self._batch_size)

    def __iter__(self) -> Iterator[Tensors]:
        count = len(self._rows.label_B)
        order_B = torch.randperm(count).numpy() if self._shuffle else np.arange(count)
        for start in range(0, count, self._batch_size):
            yield self._batch(order_B[start : start + self._batch_size])

    def _batch(self, chosen_B: NDArray[np.int64]) -> Tensors:
        rows = self._rows
        group_B = rows.group_B[chosen_B]
        longest = max(1, int(rows.length_G[group_B].max()))
        mask_BL = np.arange(longest) < rows.length_G[group_B][:, None]
        items = {
            name: np.concatenate([history_GL[group_B, :longest], rows.ad_B[name][chosen_B, None]], axis=1)
            for name, history_GL in rows.history_GL.items()
        }
        fields = {name: values_B[chosen_B] for name, values_B in rows.ad_B.items() if name not in items}
        fields |= {name: values_G[group_B] for name, values_G in rows.user_G.items()}
        return (
            {name: torch.from_numpy(values) for name, values in fields.items()}
            | {"label": torch.from_numpy(rows.label_B[chosen_B])},
            {name: torch.from_numpy(values.reshape(-1)) for name, values in items.items()},
            torch.from_numpy(mask_BL).float(),
        )


def model_of(spec: Spec, features: FeatureMap, folder: Path) -> tuple[type, dict[str, Any]]:
    """Return FuxiCTR's class of a net, and its arguments: its defaults, but for the widths, which are ours."""
    settings = {
        **_PLAIN,
        "model_root": str(folder),
        "verbose": 0,
        "embedding_dim": spec.width,
        "early_stop_patience": spec.epochs + 1,
        "learning_rate": 1e-3,
        **spec.settings,
    }
    hidden, stacked = list(spec.hidden), {"model_structure": "stacked", "stacked_dnn_hidden_units": list(spec.hidden)}
    match spec.net:
        case "dnn":
            return DCNv2, {**stacked, "num_cross_layers": 0, **settings}
        case "din":
            return DIN, {"dnn_hidden_units": hidden, **settings}
        case "dcnv2":
            return DCNv2, {"parallel_dnn_hidden_units": hidden, **settings}
        case _:
            return FinalMLP, {"mlp1_hidden_units": hidden, "mlp2_hidden_units": hidden, "use_fs": False, **settings}


def watched(base: type, test: Rows, left_out: Rows | None, batch_size: int) -> type:
    """Make a subclass that keeps the metrics of the test rows after each epoch, and the seconds of its training.

    Rows left out are measured too, after the test rows have decided whether the learning rate falls.
    """

    class Watched(base):  # type: ignore[misc]
        """A model of FuxiCTR that notes the metrics of the test rows after each epoch."""

        curve: list[dict[str, Any]]

        def train_epoch(self, data_generator: Loader) -> None:
            self._started = time.perf_counter()
            super().train_epoch(data_generator)

        def eval_step(self) -> None:
            self._seconds = time.perf_counter() - self._started
            self._measured, self._prefix = test, ""
            super().eval_step()
            if left_out is not None:
                self._measured, self._prefix = left_out, "left_out_"
                self.evaluate(Loader(left_out, batch_size, shuffle=False))
                self.train()

        def evaluate_metrics(self, y_true: Any, y_pred: Any, metrics: Any, group_id: Any = None) -> Any:
            logit_N = np.log(np.clip(y_pred, 1e-12, 1)) - np.log(np.clip(1 - y_pred, 1e-12, 1))
            rows, prefix = self._measured, self._prefix
            found = measure(logit_N, rows.label_B.astype(np.float64), rows.user_id_B, prefix)
            if prefix:
                self.curve[-1].update(found)
            else:
                self.curve.append({**found, "seconds": self._seconds})
            return super().evaluate_metrics(y_true, y_pred, metrics, group_id)

    return Watched


def feature_map(layout: Layout, known: Mapping[str, Vocabulary], rows: Rows, folder: Path, width: int) -> FeatureMap:
    """Describe the fields for FuxiCTR; those of one table share its embedding."""
    features = FeatureMap("quality", str(folder))
    specs: dict[str, dict[str, Any]] = OrderedDict()
    first: dict[str, str] = {}

    def add(field: Field, source: str) -> None:
        vocabulary = known[field.table_name]
        several = rows.ad_B.get(field.name, rows.user_G.get(field.name))
        assert several is not None
        spec: dict[str, Any] = {"source": source, "type": "categorical", "padding_idx": PADDING}
        spec |= {"vocab_size": vocabulary.size, "oov_idx": vocabulary.size - 1}
        if several.ndim > 1:
            spec |= {"type": "sequence", "max_len": several.shape[1]}
            spec["feature_encoder"] = "layers.MaskedAveragePooling()"
        if field.table_name in first:
            spec["share_embedding"] = first[field.table_name]
        first.setdefault(field.table_name, field.name)
        specs[field.name] = spec

    for _, ad in layout.items:
        add(ad, "item")
    for field in layout.rest:
        add(field, field.side)
    for _, ad in layout.images:
        if ad.store_name in known:
            specs[ad.name] = _pretrained(known[ad.store_name], folder)
    features.features, features.labels, features.default_emb_dim = specs, ["label"], width
    features.num_fields = features.get_num_fields()
    return features


def _pretrained(known: Vocabulary, folder: Path) -> dict[str, Any]:
    with np.load(folder / "features.npz") as file:
        dim = file["value"].shape[1]
    spec = {"source": "item", "type": "categorical", "padding_idx": PADDING, "vocab_size": known.size}
    pretrained = {"pretrained_emb": "features.npz", "pretrain_dim": dim, "freeze_emb": True, "pretrain_usage": "init"}
    return {**spec, **pretrained, "oov_idx": known.size - 1}


def write_features(store: str, name: str, folder: Path) -> Vocabulary:
    """Write all features of a store, standardised, as `write_pretrained`; return their vocabulary."""
    snapshot = FeatureStore.open(store).snapshot()
    keys_N = snapshot.keys()
    values_ND = snapshot.codec.decode(snapshot.get(keys_N)).astype(np.float32)
    deviation_D = values_ND.std(0)
    values_ND -= values_ND.mean(0)
    values_ND /= np.where(deviation_D > 0, deviation_D, 1)
    write_pretrained(folder, name, keys_N, values_ND)
    return Vocabulary(keys_N)


def _project_once(layer: PretrainedEmbedding) -> None:
    """Projects the table and then looks up, where the class looks up and then projects."""
    layer.forward = lambda inputs: torch.nn.functional.embedding(inputs, layer.proj(layer.pretrain_embedding.weight))


def run(spec: Spec, folder: Path) -> dict[str, Any]:
    """Train, and return the metrics of the test rows after each epoch."""
    torch.set_num_threads(spec.threads)
    schema = load_schema(spec.schema)
    layout = Layout.of(schema)
    train, test = (
        read(spec.samples, split, schema, days)
        for split, days in (("train", spec.train_days), ("test", spec.test_days))
    )
    known = vocabularies(train, [*(field for pair in layout.items for field in pair), *layout.rest])
    if spec.store:
        ad = layout.images[0][1]
        known[ad.store_name] = write_features(spec.store, ad.name, folder)
    train_rows, test_rows = (Rows.of(each, layout, known) for each in (train, test))
    left_out = None
    if spec.left_out_days:
        left_out = Rows.of(read(spec.samples, "test", schema, spec.left_out_days), layout, known)
    features = feature_map(layout, known, train_rows, folder, spec.width)
    seed_everything(spec.seed)
    base, arguments = model_of(spec, features, folder)
    model = watched(base, test_rows, left_out, spec.batch_size)(features, **arguments)
    model.curve = []
    Path(model.model_dir).mkdir(parents=True, exist_ok=True)
    for layer in model.modules():
        if isinstance(layer, PretrainedEmbedding) and spec.settings.get("project_once", True):
            _project_once(layer)
    training = Loader(train_rows, spec.batch_size, shuffle=True)
    validation = Loader(test_rows, spec.batch_size, shuffle=False)
    model.fit(training, epochs=spec.epochs, validation_data=validation)
    return {"curve": model.curve}


def main(spec: Path, result: Path) -> None:
    """Read what to run, run it, and write what it found."""
    with tempfile.TemporaryDirectory() as folder:
        found = run(Spec(**json.loads(spec.read_text())), Path(folder))
    result.write_text(json.dumps(found))


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
