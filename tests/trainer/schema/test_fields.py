"""Schema files: the packaged one, and how mistakes in one's own are told."""

from pathlib import Path

import pytest

from trainer.errors import SchemaError
from trainer.schema import load_schema

OWN = """
new_ad_field: ad
fields:
  - {name: user, side: user, kind: id}
  - {name: ad, side: ad, kind: id, column: ad_number}
  - {name: picture, side: ad, kind: content, store: covers}
"""


def test_packaged_schema_has_both_images_and_their_ids() -> None:
    schema = load_schema()
    columns = {field.name: (field.side, field.kind, field.column_name) for field in schema.fields}
    assert columns["behavior_image"] == ("user", "content", "behavior_image")
    assert columns["ad_image"] == ("ad", "content", "ad_image")
    assert columns["behavior_image_id"] == ("user", "multi_id", "behavior_image")
    assert columns["ad_image_id"] == ("ad", "id", "ad_image")


def test_own_schema(tmp_path: Path) -> None:
    path = tmp_path / "schema.yaml"
    path.write_text(OWN)
    schema = load_schema(path)
    assert [(field.column_name, field.store_name) for field in schema.of_kind("content")] == [("picture", "covers")]
    assert (schema.label, schema.group, schema.new_ad_field) == ("label", "user", "ad")


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("side: user", "sied: user", "fields.0.sied is unknown; did you mean fields.0.side?"),
        ("kind: content", "kind: image", "fields.2.kind='image'"),
        ("fields:", "field:", "field is unknown; did you mean fields?"),
        (
            "new_ad_field: ad",
            "new_ad_field: adx",
            "has to be a field of side ad and kind id; did you mean ad?",
        ),
        ("new_ad_field: ad", "new_ad_field: user", "new_ad_field=user has to be a field of side ad"),
        ("name: ad,", "name: user,", "field user is named twice"),
        ("store: covers", "table: covers", "table=covers is for kinds id and multi_id"),
        (
            "store: covers}",
            "store: covers}\n  - {name: back, side: ad, kind: content, store: covers, width: 4}",
            "fields picture and back share store covers but have width=None and width=4; give both one width",
        ),
    ],
)
def test_mistakes_are_named(tmp_path: Path, old: str, new: str, message: str) -> None:
    path = tmp_path / "schema.yaml"
    path.write_text(OWN.replace(old, new))
    with pytest.raises(SchemaError) as caught:
        load_schema(path)
    assert message in str(caught.value)
    assert str(path) in str(caught.value)


@pytest.mark.parametrize("text", ["- a", "fields: [", ""])
def test_files_that_are_no_schema(tmp_path: Path, text: str) -> None:
    path = tmp_path / "schema.yaml"
    path.write_text(text)
    with pytest.raises(SchemaError, match=r"schema\.yaml"):
        load_schema(path)
    with pytest.raises(SchemaError, match="there is no such file"):
        load_schema(tmp_path / "absent.yaml")
