"""Texts and crossed columns as IDs: the same numbers whatever Arrow type they come in, and what is refused."""

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from featurestore.errors import MissingKeysError
from featurestore.format.rows import FeatureRows
from featurestore.keys import key_of_uri
from featurestore.store import FeatureStore
from pipeline.samples.mapping import parse_ids
from tests.trainer.alike import all_alike
from tests.trainer.samples.texts.wordy import hashed, replaced, rewrite, written
from trainer.comm import SoloComm
from trainer.config.config import load_config
from trainer.errors import DataError, SchemaError
from trainer.main import train
from trainer.runs.open import open_run
from trainer.samples.index import known_ads, open_index
from trainer.samples.reader import Batch, SampleReader
from trainer.schema import Field, Schema, load_schema

SCHEMA = load_schema()
COLUMNS = ("user", "ad_item", "behavior_item", "ad_image", "behavior_image", "ad_scene")
KINDS = [pa.string(), pa.large_string(), pa.dictionary(pa.int32(), pa.string())]


def read(folder: Path, schema: Schema = SCHEMA, **options: Any) -> list[Batch]:
    index = open_index(SoloComm(), str(folder), "train", schema)
    return list(SampleReader(index, schema, **{"batch_size": 1000, **options}).batches())


def one_file(folder: Path, table: pa.Table) -> Path:
    (folder / "train").mkdir(parents=True)
    pq.write_table(table, folder / "train" / "a.parquet", row_group_size=4)
    return folder


@pytest.mark.parametrize("kind", KINDS)
def test_texts_of_any_type_are_their_hash(kind: Any, tmp_path: Path, sample_table: Callable[..., pa.Table]) -> None:
    numbers = sample_table(9)
    (expected,) = read(
        one_file(tmp_path / "numbers", replaced(numbers, COLUMNS, pa.int64(), lambda c, n: hashed(written(c, n))))
    )
    (found,) = read(one_file(tmp_path / "texts", replaced(numbers, COLUMNS, kind, written)))
    for name, field in expected.fields.items():
        np.testing.assert_array_equal(found.fields[name].values_N, field.values_N, name)
        np.testing.assert_array_equal(found.fields[name].lengths_M, field.lengths_M, name)
    np.testing.assert_array_equal(found.group_id_B, expected.group_id_B)


def test_build_samples_makes_the_same_ids(tmp_path: Path, sample_table: Callable[..., pa.Table]) -> None:
    texts = ["7", "-7", " 7 ", "07", "+7", "9223372036854775807", "9223372036854775808", "", "ü", "1٢", "nan"]
    table = sample_table(len(texts)).set_column(0, "user", pa.array(texts))
    (batch,) = read(one_file(tmp_path, table), seed=None)
    found = batch.fields["user"].values_N.tolist()
    assert found == parse_ids(pa.chunked_array([texts]))[0].tolist()
    assert found[:3] == [7, -7, 7]
    assert found[3:5] == [hashed("07"), hashed("+7")]
    assert found[5] == 2**63 - 1
    assert found[6:] == [hashed(text) for text in texts[6:]]


def test_a_uri_is_hashed_also_where_it_is_a_number(tmp_path: Path, sample_table: Callable[..., pa.Table]) -> None:
    table = replaced(sample_table(3), ("ad_image",), pa.string(), lambda column, number: str(number))
    (batch,) = read(one_file(tmp_path, table), seed=None)
    keys = [key_of_uri(text) for row in table["ad_image"].to_pylist() for text in row]
    assert batch.fields["ad_image"].values_N.tolist() == batch.fields["ad_image_id"].values_N.tolist() == keys


CROSSED = Schema(
    fields=(
        Field(name="ad_item", side="ad", kind="id"),
        Field(name="ad_pair", side="ad", kind="id", columns=("ad_item", "ad_scene")),
        Field(name="behavior_pair", side="user", kind="multi_id", columns=("behavior_item", "behavior_category")),
    )
)


@pytest.mark.parametrize("texts", [(), ("ad_item", "behavior_category"), ("ad_item", "ad_scene")])
def test_crossed_columns(texts: tuple[str, ...], tmp_path: Path, sample_table: Callable[..., pa.Table]) -> None:
    table = replaced(sample_table(9), texts, pa.string(), written)
    (batch,) = read(one_file(tmp_path, table), CROSSED, seed=None)

    def pairs(first: str, second: str) -> list[int]:
        rows = zip(table[first].to_pylist(), table[second].to_pylist(), strict=True)
        values = [list(pair) for row in rows for pair in zip(*row, strict=True)]
        return [hashed(json.dumps(pair, ensure_ascii=False, separators=(",", ":"))) for pair in values]

    assert batch.fields["ad_pair"].values_N.tolist() == pairs("ad_item", "ad_scene")
    assert batch.fields["behavior_pair"].values_N.tolist() == pairs("behavior_item", "behavior_category")
    assert set(batch.fields["ad_pair"].lengths_M) == {1}
    index = open_index(SoloComm(), str(tmp_path), "train", CROSSED)
    found = known_ads(SoloComm(), index, CROSSED.model_copy(update={"new_ad_field": "ad_pair"}))
    assert found.tolist() == sorted(set(pairs("ad_item", "ad_scene")))


def test_no_two_tuples_are_one_id(tmp_path: Path, sample_table: Callable[..., pa.Table]) -> None:
    first, second = ["a,b", "a", 'a","b', "1"], ["c", "b,c", "c", "1"]
    table = sample_table(4).append_column("first", pa.array(first)).append_column("second", pa.array(second))
    schema = Schema(fields=(Field(name="pair", side="user", kind="id", columns=("first", "second")),))
    (batch,) = read(one_file(tmp_path, table), schema, seed=None)
    expected = ['["a,b","c"]', '["a","b,c"]', '["a\\",\\"b","c"]', "[1,1]"]
    assert batch.fields["pair"].values_N.tolist() == [hashed(text) for text in expected]


def test_text_that_is_not_utf8_is_named(tmp_path: Path, sample_table: Callable[..., pa.Table]) -> None:
    table = sample_table(3)
    users = pa.array([b"a", b"\xff", b"c"]).view(pa.string())
    table = table.set_column(table.schema.get_field_index("user"), "user", users)
    with pytest.raises(DataError, match=r"a\.parquet: column user has text that is not UTF-8; write the file in UTF-8"):
        read(one_file(tmp_path, table))


@pytest.mark.parametrize(
    ("column", "edit", "message"),
    [
        ("ad_item", lambda row: [None, *row[1:]], "column ad_item has a null in its list"),
        ("user", lambda row: None, "column user is null"),
        ("behavior_category", lambda row: [*row, "a"], "each behaviour needs one entry in both"),
        ("ad_scene", lambda row: [*row, "a"], "each impression needs one entry in both"),
    ],
)
def test_wrong_texts_are_named(
    column: str, edit: Callable[[Any], Any], message: str, tmp_path: Path, sample_table: Callable[..., pa.Table]
) -> None:
    table = replaced(sample_table(9), (*COLUMNS, "behavior_category"), pa.string(), lambda column, n: f"i{n}")
    values = table[column].to_pylist()
    values[6] = edit(values[6])
    made = pa.array(values, table.schema.field(column).type)
    table = table.set_column(table.schema.get_field_index(column), column, made)
    with pytest.raises(DataError) as caught:
        read(one_file(tmp_path, table))
    assert (
        f"a.parquet, row 6: {message}"
        in f"{str(caught.value).partition('row ')[0]}row {str(caught.value).partition('row ')[2]}"
        or message in str(caught.value)
    )
    assert "a.parquet, row 6: column " in str(caught.value)


def test_crossed_lists_have_to_be_equally_long(tmp_path: Path, sample_table: Callable[..., pa.Table]) -> None:
    table = (
        sample_table(5)
        .append_column("ad_tags", pa.array([[[1, 2]] * 9] * 5))
        .append_column("ad_sizes", pa.array([[[1, 2]] * 9] * 5))
    )
    counts = [len(row) for row in table["label"].to_pylist()]
    tags = [[[1, 2]] * count for count in counts]
    sizes = [[[1, 2]] * count for count in counts]
    sizes[3][-1] = [1]
    table = table.set_column(table.schema.get_field_index("ad_tags"), "ad_tags", pa.array(tags))
    table = table.set_column(table.schema.get_field_index("ad_sizes"), "ad_sizes", pa.array(sizes))
    schema = Schema(fields=(Field(name="pair", side="ad", kind="multi_id", columns=("ad_tags", "ad_sizes")),))
    with pytest.raises(
        DataError, match=r"a\.parquet, row 3: column ad_sizes has 1 entries, ad_tags has 2; each crossed"
    ):
        read(one_file(tmp_path, table), schema)


def test_a_crossed_column_that_is_missing_is_named(tmp_path: Path, sample_table: Callable[..., pa.Table]) -> None:
    folder = one_file(tmp_path, sample_table(4).drop_columns(["ad_scene"]))
    with pytest.raises(SchemaError, match=r"column ad_scene is missing, expected list<integer> \(or list<string>\)"):
        read(folder, CROSSED)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"kind": "dense", "columns": ("a", "b")}, "columns=('a', 'b') is for kinds id and multi_id, not dense"),
        ({"kind": "id", "columns": ("a",)}, "has to name two columns or more, each once"),
        (
            {"kind": "id", "columns": ("a", "b"), "buckets": 4},
            "it has buckets and columns=['a', 'b']; give one",
        ),
        ({"kind": "id", "columns": ("a", "a")}, "has to name two columns or more, each once"),
        ({"kind": "id", "columns": ("a", "b"), "column": "c"}, "it has column=c and columns=['a', 'b']; give one"),
    ],
)
def test_wrong_crossings_in_a_schema(values: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match="field pair: ") as caught:
        Field(name="pair", side="user", **values)
    assert message in str(caught.value)


@pytest.mark.long
def test_training_on_texts_is_training_on_their_hashes(make_places: Callable[[Path], Any], tmp_path: Path) -> None:
    trained = []
    columns = ("user", "ad_item", "behavior_item", "ad_scene", "ad_category", "behavior_category")
    for name, kind, value in (
        ("texts", pa.string(), written),
        ("numbers", pa.int64(), lambda c, n: hashed(written(c, n))),
    ):
        places = make_places(tmp_path / name)
        rewrite(places.folder / "samples", partial(replaced, columns=columns, kind=kind, value=value))
        settings = places.settings(run__name="run", train__max_steps=12)
        train(load_config(settings=settings), SoloComm())
        run = open_run(load_config(settings=[*settings, "run.resume=latest"]), SoloComm())
        run.close()
        trained.append(({**run.engine.dense_state(), **run.engine.shard_state()}, run.history[-1]))
    (texts, measured), (numbers, expected) = trained
    assert measured == all_alike(expected, within=1e-9)
    assert expected["new_ad_auc"] is not None
    assert texts.keys() == numbers.keys()
    for name, value in numbers.items():
        assert value.equal(texts[name]), name


@pytest.mark.long
def test_images_by_their_uris(make_places: Callable[[Path], Any], tmp_path: Path) -> None:
    places = make_places(tmp_path / "places")
    by_key = FeatureStore.open(places.folder / "features").snapshot()
    keys = list(range(1_000, 1_050))
    store = FeatureStore.create(places.folder / "by-uri", by_key.info)
    store.put(FeatureRows.of([f"shots/ü{key}.jpg" for key in keys], by_key.get(np.array(keys))))
    columns = ("ad_image", "behavior_image")
    rewrite(
        places.folder / "samples",
        partial(replaced, columns=columns, kind=pa.string(), value=lambda column, key: f"shots/ü{key}.jpg"),
    )
    train(load_config(settings=places.settings(run__name="run", data__store=store.url, train__max_steps=2)), SoloComm())
    with pytest.raises(MissingKeysError):
        without = places.settings(run__name="none", train__max_steps=2, data__missing="error")
        train(load_config(settings=without), SoloComm())
