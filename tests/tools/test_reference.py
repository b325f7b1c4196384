"""What a comparison of two records lists, what it counts, and what a record says of files."""

import functools
import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from tests.cli import invoke
from tools import reference
from tools.reference import app, digests_of, files_of

COLUMNS = " ".join(f"name{number}" for number in range(100))
RECORD = {
    "header": {"commit": "a", "torch": "2.13"},
    "scenarios": {"lr": {"loss 1": (0.75).hex(), "trained item": "12"}, "din": {"loss 1": (0.5).hex()}},
    "files": {"samples/a.parquet": {"columns": COLUMNS, "column user": "1", "column ad": "2"}},
    "settings": {"default": {"model.base": "mlp"}, "model.base=lr": {"model.base": "lr"}},
}


@pytest.mark.parametrize(
    ("changes", "code", "lines"),
    [
        ({}, 0, []),
        ({("scenarios", "lr"): None}, 0, ["scenarios: gone: lr"]),
        ({("scenarios", "dcn"): {"loss 1": "1"}}, 0, ["scenarios: new: dcn"]),
        ({("settings", "model.base=lr"): None}, 0, ["settings: gone: model.base=lr"]),
        ({("settings", "default", "a.b"): "1"}, 0, ["settings: new: a.b: default (nothing -> 1)"]),
        ({("header", "torch"): "2.14"}, 0, ["warning: torch was 2.13 and is 2.14; that alone may change bits"]),
        (
            {("scenarios", "lr", "loss 1"): (0.625).hex(), ("scenarios", "lr", "trained item"): "13"},
            1,
            ["scenarios: changed: lr: loss 1 (0.75 -> 0.625), trained item"],
        ),
        (
            {("files", "samples/a.parquet", "columns"): COLUMNS.replace("name95", "price")},
            1,
            [
                "files: changed: samples/a.parquet: columns "
                "(...name90 name91 name92 name93 name94 name95 name96 name97 name98 name... -> "
                "...name90 name91 name92 name93 name94 price name96 name97 name98 name9...)"
            ],
        ),
        ({("scenarios", "lr", "trained item"): None}, 1, ["scenarios: gone: lr: trained item (12 -> nothing)"]),
        ({("files", "samples/a.parquet"): None}, 1, ["files: gone: samples/a.parquet"]),
        ({("settings", "default", "model.base"): "din"}, 1, ["settings: changed: model.base: default (mlp -> din)"]),
    ],
)
def test_what_is_listed_and_what_is_a_difference(tmp_path: Path, changes, code, lines) -> None:
    """A record compared with itself after some changes: path -> new value, None to remove it."""
    other = json.loads(json.dumps(RECORD))
    for (*parents, last), value in changes.items():
        place = functools.reduce(dict.__getitem__, parents, other)
        place[last] = value
        if value is None:
            del place[last]
    (tmp_path / "old").write_text(json.dumps(RECORD))
    (tmp_path / "new").write_text(json.dumps(other))
    result = invoke(app, "compare", tmp_path / "old", tmp_path / "new", code=code)
    said = f"{len(changes)} differences between a and a" if code else "no differences between a and a"
    assert result.output.splitlines() == [*lines, said]


def test_a_renamed_tensor_changes_names_alone_and_ids_and_times_are_left_out_of_files(tmp_path: Path) -> None:
    values = {"model.mlp.0.weight": torch.ones(2), "item/0000/weight": torch.zeros(2)}
    values["item/0001/weight"] = torch.ones(0)
    before = digests_of(values)
    after = digests_of({name.replace("mlp.0", "mlp.first"): value for name, value in values.items()})
    assert [name for name in before if before[name] != after[name]] == ["names"]
    assert digests_of(values | {"item/0000/weight": -torch.zeros(2)})["item/weight"] != before["item/weight"]
    records = []
    for digit, columns in (("a", ["x", "y"]), ("b", ["x", "y"]), ("b", ["y", "x"])):
        folder = tmp_path / str(len(records))
        (folder / "features" / "data").mkdir(parents=True)
        content = {"store_id": 32 * digit, "time_s": ord(digit), "url": str(folder / "features"), "rows": 3}
        (folder / "features" / "store.json").write_text(json.dumps(content))
        table = pa.table({"x": [1.5, None], "y": [[1], []]}).select(columns)
        table = table.replace_schema_metadata({"of": 40 * digit})
        pq.write_table(table, folder / f"features/data/{32 * digit}.parquet")
        records.append(files_of(folder))
    alike, other, swapped = records
    assert sorted(alike) == ["features/data/*.parquet", "features/store.json"]
    assert alike["features/store.json"] == {"store_id": '"*"', "url": '"WORLD/features"', "rows": "3"}
    assert other == alike
    changed = list(reference.changes({"files": alike}, {"files": swapped}))
    assert [(each.entry, each.key) for each in changed] == [("features/data/*.parquet", "columns")]


def test_a_command_that_fails_ends_the_record(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(reference.typer.Exit) as end:
        reference.run("python -c 'raise SystemExit(\"no room\")'", tmp_path)
    assert end.value.exit_code == 2
    assert "no room" in capsys.readouterr().err
