"""The parsers of files and bodies that others write: valid inputs of each, how it is called, and its good errors."""

import atexit
import contextlib
import functools
import io
import json
import os
import shutil
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch
import xxhash
from PIL import Image, ImageOps
from safetensors.torch import save

from featurestore.errors import CorruptFileError, FeatureStoreError
from featurestore.format.codec import Moments
from featurestore.format.datafile import FeatureRows, open_entry
from featurestore.parsing import format_yaml
from featurestore.spec import ExtractorSpec, Manifest, StoreInfo, seal
from featurestore.storage.remote import leads_out
from featurestore.storage.storage import Storage
from featurestore.store import FeatureStore
from pipeline.errors import BadImageError, SampleError
from pipeline.images.decode import JPEG_START, PIXELS_16_BIT, decode
from pipeline.samples.logs import find_pieces, read_piece
from pipeline.samples.mapping import LogMapping, load_mapping
from serving.errors import RequestError
from serving.http.codec import ArrowBody, JsonBody
from serving.http.inference import Body, TensorBody
from serving.network import run_steps
from serving.scoring.decode import decode as decode_body
from serving.settings import Budget
from tests.featurestore.contents import rows_of
from tests.fuzz import mutate
from tests.serving.scoring.wide import COLUMNS, SCHEMA, table_of
from trainer.comm.comm import SoloComm
from trainer.config import Config, load_config, load_saved
from trainer.errors import CheckpointError, ConfigError, TrainerError
from trainer.runs.checkpoint import CheckpointState, RunFingerprint, read_dense, read_rows, read_state
from trainer.runs.folder import Checkpoint
from trainer.samples.columns import decode as decode_samples
from trainer.samples.columns import rules_of
from trainer.samples.index import open_index, read_row_groups

SPEC = ExtractorSpec(backbone="b", layer="l", weights_digest="0", preprocessing="p", compute_dtype="float32")
INFO = StoreInfo(dim=8, num_shards=2, extractor=SPEC)
GROUP: dict[str, Any] = {
    "user": "u-1", "user_age": 31.5, "user_size": None, "user_tags": [5, 6], "user_tag_weights": [0.5, 2.0],
    "behavior_item": [1, 2], "behavior_age": [3.0, 400.0], "behavior_shop": ["a", " 7 "],
    "behavior_image": ["x.jpg", "y.jpg"], "ad_item": [1, 2], "ad_scene": ["s", "s"],
    "ad_shops": [[1, 2], [2, 3]], "ad_shop_weights": [[0.5, 1.0], [1.0, 1.0]], "ad_price": [0.5, 1.0],
    "ad_shape": [[1.0, 2.0], [2.0, 3.0]], "ad_image": ["z.jpg", ""], "label": [0, 1],
}  # fmt: skip
TEXTS = frozenset({"user", "behavior_shop", "behavior_image", "ad_scene", "ad_image"})
AD = {"price": "dense", "tags": {"kind": "multi_id", "split": "|"}}
MAPPING: dict[str, Any] = {
    "impressions": {"files": "log.csv", "columns": {"item": "sku"}, "ad": AD},
    "behaviors": "clicks",
    "time_format": "%d/%m/%Y %H:%M",
}
EVENTS: dict[str, Any] = {
    "impressions": {
        "files": "log.csv",
        "columns": {"timestamp": "ts", "image": None},
        "where": {"column": "event", "value": "view", "clicked": ["click", "buy"], "within_s": 600},
    },
    "behaviors": {"files": "log.csv", "where": {"column": "event", "value": "cart"}},
    "join": {"item": {"files": "items.csv", "column": "sku"}, "user": {"files": "users.csv"}},
    "csv": {"delimiter": ";", "encoding": "latin-1", "decimal": ","},
}
EMPTY = Moments.empty(8)
TENSORS_FILE = save({"model.a": torch.arange(6.0).reshape(2, 3), "item/0000/weight": torch.arange(4)})
YAML_S = 4.0  # PyYAML takes 22 us a byte
BASE = Path(tempfile.mkdtemp(prefix="fuzz-"))
atexit.register(lambda pid=os.getpid(): pid == os.getpid() and shutil.rmtree(BASE, ignore_errors=True))


@dataclass(frozen=True)
class Parser:
    """A parser: valid inputs, what reads one, the errors that it may raise, and the seconds that it may take."""

    name: str
    valid: Callable[[], list[bytes]]
    parse: Callable[[bytes], object]
    errors: type[Exception]
    form: mutate.Form = mutate.BYTES
    most_s: float = 1.0
    most_mb: int = 300


@functools.cache
def _place(_: int, name: str) -> Path:
    """Make a folder of this process, whose id comes first."""
    return Path(tempfile.mkdtemp(dir=BASE, prefix=name))


def _written(name: str, data: bytes) -> Path:
    """Write a file into a folder of its own."""
    file = _place(os.getpid(), name.replace("/", "-")) / name
    file.parent.mkdir(exist_ok=True)
    file.write_bytes(data)
    return file


@functools.cache
def _store(process: int) -> tuple[FeatureStore, Manifest]:
    """Make a store with rows in both shards; its manifest is that of its first commit."""
    store = FeatureStore.create(_place(process, "store") / "of", INFO)
    rows = FeatureRows.of([f"{n}.jpg" for n in range(6)], np.arange(48, dtype=np.float32).reshape(6, 8))
    return store, store.put(rows).manifest


def _read_manifest(data: bytes) -> None:
    store, _ = _store(os.getpid())
    store.storage.write_bytes("log/00000000000000000001.json", data)
    snapshot = store.snapshot()
    assert not any(leads_out(entry.path) for entry in snapshot.manifest.entries)
    snapshot.statistics()
    for shard in snapshot.manifest.shards:
        reader = snapshot.shard_reader(shard)
        reader.uris(reader.keys())
        sum(len(block.keys_K) for block in reader.verified_blocks())


def _shard_files() -> list[bytes]:
    store, manifest = _store(os.getpid())
    return [store.storage.read_bytes(entry.path) for entry in manifest.entries]


def _read_shard(data: bytes) -> None:
    """Read rows of a file whose length is right, and whose digests nobody looks at."""
    store, manifest = _store(os.getpid())
    entry = manifest.entries[0].model_copy(update={"path": "data/fuzz.parquet", "bytes": len(data)})
    store.storage.write_bytes(entry.path, data)
    with open_entry(store.storage, INFO, entry) as file:
        rows_of(file.read(), INFO)
        list(file.blocks(["key", "feature"]))


def _groups(count: int) -> pa.Table:
    return table_of([GROUP] * count, TEXTS)


def _read_samples(data: bytes) -> None:
    folder, rules = _written("train/day=2026-01-01.parquet", data).parent.parent, rules_of(SCHEMA)
    index = open_index(SoloComm(), Storage(folder), "train", SCHEMA)
    for row_group, table in read_row_groups(index.storage, index.row_groups, [*COLUMNS.sources, "label"]):
        decode_samples(table, rules, SCHEMA.label, row_group.file, row_group.first_row)


def _state() -> bytes:
    commit = {"url": "s", "version": 1, "store_id": "0" * 32, "commit_id": "0" * 32}
    files = dict.fromkeys(("dense.safetensors", "rows-0-of-1.safetensors"), xxhash.xxh3_128_hexdigest(TENSORS_FILE))
    origin = RunFingerprint(data={"a": 1}, train={"seed": 0}, model={}, stores={}, optim={})
    position = {"step": 1, "epoch": 0, "step_in_epoch": 1, "num_ranks": 1}
    values = position | {"origin": origin, "stores": {"images": commit}, "history": [{"loss": 0.5}], "files": files}
    return seal(CheckpointState.model_validate(values))


def _read_checkpoint(data: bytes) -> None:
    file = _written("step-00000001/state.json", data)
    for name in ("dense", "rows-0-of-1"):
        (file.parent / f"{name}.safetensors").write_bytes(TENSORS_FILE)
    checkpoint = Checkpoint(file.parent.parent, file.parent.name, Storage(file.parent.parent))  # type: ignore[arg-type]
    state = read_state(checkpoint)
    read_dense(checkpoint, state, prefix="model.")
    read_rows(checkpoint, state, ["item/0000/weight"])


def _read_moments(data: bytes) -> None:
    """Read moments; those that are taken are numbers of a column each."""
    moments = Moments.from_bytes(data, 3, "f")
    assert moments.mean_D.dtype == np.float64 and moments.mean_D.shape == moments.m2_D.shape


def _requests() -> list[bytes]:
    ads = {name: value for name, value in GROUP.items() if name.startswith("ad_")}
    one = {"user": {name: value for name, value in GROUP.items() if name not in {*ads, "label"}}, "candidates": ads}
    return [json.dumps(each).encode() for each in (one, [one, one | {"context": {}}], {"requests": [one]})]


def _tensor_body() -> bytes:
    values = {name: 0.5 if GROUP[name] is None else GROUP[name] for name in COLUMNS.sources}
    return mutate.tensors_of(values, id="1", outputs=[{"name": "score"}])


def _read_body(body: Body) -> None:
    """Read a body; one that is taken is a batch of even columns."""
    sent = run_steps(body.decode(COLUMNS, Budget()))
    sent.sizes(COLUMNS).check(Budget())
    batch = run_steps(decode_body(COLUMNS, sent)).batch
    for field in SCHEMA.of_kind("id", "multi_id", "content"):
        jagged = batch.fields[field.name]
        assert len(jagged.lengths_M) == (batch.num_samples if field.side == "ad" else len(sent.counts_G))
        assert jagged.lengths_M.sum() == len(jagged.values_N)


def _read_tensors(data: bytes) -> None:
    header, _, body = data.partition(b"\n")
    _read_body(TensorBody(body, header.decode("latin-1"), "ctr"))


def _read_arrow(data: bytes) -> None:
    """Read a body; none with a null where an id belongs is taken."""
    _read_body(ArrowBody(data))
    table = pa.ipc.open_stream(data).read_all()
    for name, rule in COLUMNS.sources.items():
        if name in table.column_names and not rule.is_real and name not in COLUMNS.nullable:
            array = table[name].combine_chunks()
            for _ in range(rule.depth):
                array = array.flatten()
            assert not array.null_count, f"{name} has a null, which became an id"


def _mappings() -> list[bytes]:
    return [format_yaml(each).encode() for each in (MAPPING, EVENTS)]


def _read_mapping(data: bytes) -> None:
    mapping = load_mapping(_written("mapping.yaml", data))
    for log in ("impressions", "behaviors"):
        layout = mapping.layout(log)
        for join in layout.joins:
            layout = layout.with_columns_of(join, own=("ts", "event"), there=("sku", "price", "tags", "user"))
        assert layout.of_all_rows().where is None


def _settings() -> list[bytes]:
    return [format_yaml(Config().model_dump(mode="json")).encode()]


def _read_settings(data: bytes) -> None:
    file = _written("config.yaml", data)
    load_config(file)
    load_saved(file)


def _images() -> list[bytes]:
    grey = Image.fromarray((np.arange(2_400).reshape(40, 60) % 256).astype(np.uint8))
    wide = Image.fromarray(np.arange(2_400, dtype=np.uint16).reshape(40, 60))
    clear, colour, turned = grey.convert("RGBA"), grey.convert("RGB"), Image.Exif()
    clear.putalpha(grey)
    turned[0x0112] = 6
    saved = [(grey, kind) for kind in ("GIF", "BMP", "TIFF", "WEBP")]
    saved += [(clear, "PNG"), (wide, "PNG"), (colour, "JPEG")]
    sinks = [io.BytesIO() for _ in saved]
    for (image, kind), sink in zip(saved, sinks, strict=True):
        image.save(sink, kind, exif=turned)
    return [sink.getvalue() for sink in sinks]


def _read_image(data: bytes) -> None:
    """Decode an image; one that is taken is as upright, as large and as bright as Pillow has it."""
    image, size = decode(data)
    assert image.mode == "RGB"
    if data.startswith(JPEG_START):
        return
    with contextlib.suppress(Exception):  # EXIF data that nobody can read
        upright = ImageOps.exif_transpose(Image.open(io.BytesIO(data)))
    assert image.size == size == upright.size
    if upright.mode in PIXELS_16_BIT:
        assert (np.asarray(image)[..., 0] == np.asarray(upright) >> 8).all(), "another brightness"


def _logs() -> list[bytes]:
    rows = ["01/02/2026 10:00,u1,5,a.jpg,0,1.5,x|y", "1767225600,7,5,,1,2,", '03/02/2026 12:00,"u,3",6,b.jpg,1,-3,z']
    text = "\n".join(["timestamp,user,sku,image,label,price,tags", *rows, ""])
    return [text.encode(), text.replace(",", ";").replace("u1", "ü").encode("latin-1")]


def _read_log(data: bytes) -> None:
    folder, mapping = _written("log.csv", data).parent, LogMapping.model_validate(MAPPING)
    for log in ("impressions", "behaviors"):
        with contextlib.redirect_stdout(io.StringIO()):
            pieces = find_pieces(str(folder), log, mapping.layout(log))
        for piece in pieces:
            read_piece(piece, latest_s=2_000_000_000)


PARSERS = [
    Parser("manifest", lambda: [seal(_store(os.getpid())[1])], _read_manifest, FeatureStoreError, mutate.SEALED),
    Parser("shard", _shard_files, _read_shard, FeatureStoreError, mutate.SHARD),
    Parser("statistics", lambda: [EMPTY.to_bytes()], _read_moments, CorruptFileError, mutate.NPY),
    Parser("samples", lambda: [mutate.parquet_of(_groups(3))], _read_samples, TrainerError, mutate.PARQUET),
    Parser("checkpoint", lambda: [_state()], _read_checkpoint, CheckpointError, mutate.SEALED),
    Parser("json request", _requests, lambda data: _read_body(JsonBody(data)), RequestError, mutate.JSON),
    Parser("tensor request", lambda: [_tensor_body()], _read_tensors, RequestError, mutate.TENSORS),
    Parser("arrow request", lambda: [mutate.stream_of(_groups(2))], _read_arrow, RequestError, mutate.STREAM),
    Parser("mapping", _mappings, _read_mapping, SampleError, mutate.YAML, YAML_S),
    Parser("settings", _settings, _read_settings, ConfigError, mutate.YAML, YAML_S),
    Parser("image", _images, _read_image, BadImageError, mutate.PNG),
    Parser("csv log", _logs, _read_log, SampleError),
]


def named(name: str) -> Parser:
    """Find a parser. Raises StopIteration."""
    return next(each for each in PARSERS if each.name == name)
