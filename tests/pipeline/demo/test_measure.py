"""The look of a person's own photographs is measured from their pixels; labels become categories."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from pipeline.demo.items import ATTRIBUTES, NO_LABEL, measure, measure_folder
from pipeline.errors import DemoError, SourceError

COLUMN = {name: index for index, name in enumerate(ATTRIBUTES)}


def _plain(red: int, green: int, blue: int) -> Image.Image:
    return Image.new("RGB", (120, 90), (red, green, blue))


def _noise(contrast: float, grain_px: int = 1) -> Image.Image:
    rng = np.random.default_rng(0)
    grey = 128 + contrast * rng.standard_normal((96 // grain_px, 96 // grain_px))
    grey = np.kron(grey, np.ones((grain_px, grain_px)))
    return Image.fromarray(np.clip(grey, 0, 255).astype(np.uint8)).convert("RGB")


@pytest.mark.parametrize(
    ("attribute", "less", "more"),
    [
        ("red_green", _plain(40, 200, 90), _plain(200, 40, 90)),
        ("yellow_blue", _plain(60, 60, 200), _plain(200, 200, 40)),
        ("light", _plain(60, 60, 60), _plain(220, 220, 220)),
        ("vivid", _plain(140, 120, 120), _plain(250, 20, 20)),
        ("contrast", _noise(5), _noise(60)),
        ("texture", _noise(30, grain_px=16), _noise(30)),
    ],
)
def test_each_attribute_grows_with_what_it_is_named_after(attribute: str, less: Image.Image, more: Image.Image) -> None:
    assert measure(less)[COLUMN[attribute]] < measure(more)[COLUMN[attribute]]


def test_size_does_not_matter_much() -> None:
    image = _noise(40, grain_px=12)
    np.testing.assert_allclose(measure(image), measure(image.resize((288, 288), Image.Resampling.NEAREST)), rtol=0.02)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    images = tmp_path / "photos"
    (images / "more").mkdir(parents=True)
    _plain(200, 40, 40).save(images / "red.jpg")
    _plain(40, 40, 200).save(images / "more" / "blue.png")
    _plain(40, 200, 40).save(images / "green.jpeg")
    (images / "broken.jpg").write_text("no image")
    (images / "notes.txt").write_text("no image either")
    return images


def test_all_readable_images_become_items(folder: Path) -> None:
    catalogue, notes = measure_folder(folder, None)
    assert catalogue.uris == ("green.jpeg", "more/blue.png", "red.jpg")
    assert catalogue.category_names == (NO_LABEL,)
    assert (list(notes["unreadable"]), notes["num_unreadable"]) == (["broken.jpg"], 1)
    np.testing.assert_allclose(catalogue.look_IK.mean(axis=0), 0, atol=1e-9)
    assert catalogue.look_IK[:, COLUMN["red_green"]].argmax() == 2


def test_labels_are_found_by_path_or_name_with_or_without_extension(folder: Path, tmp_path: Path) -> None:
    labels = tmp_path / "labels.csv"
    labels.write_text("image,label,kids\nred,dress,no\nmore/blue.png,hat,no\nelsewhere,shoe,no\n")
    catalogue, notes = measure_folder(folder, labels)
    names, category_I = catalogue.category_names, catalogue.category_I
    assert [names[category] for category in category_I] == [NO_LABEL, "hat", "dress"]
    assert notes["num_unlabelled"] == 1


def test_a_table_without_the_columns_is_refused_with_what_it_has(folder: Path, tmp_path: Path) -> None:
    labels = tmp_path / "labels.csv"
    labels.write_text("file,label\nred,dress\n")
    with pytest.raises(DemoError, match=r"needs the columns image and label; it has file, label"):
        measure_folder(folder, labels)
    labels.write_bytes(b"image,label\n\xff\xfe,dress\n")
    with pytest.raises(DemoError, match=r"cannot read the labels .*labels\.csv"):
        measure_folder(folder, labels)
    with pytest.raises(DemoError, match="cannot read the labels"):
        measure_folder(folder, tmp_path / "none.csv")


def test_a_folder_without_a_readable_image_is_refused(tmp_path: Path) -> None:
    with pytest.raises(SourceError, match="no images in"):
        measure_folder(tmp_path, None)
    (tmp_path / "one.jpg").write_text("no image")
    with pytest.raises(DemoError, match=r"none of the 1 images .* can be read"):
        measure_folder(tmp_path, None)
