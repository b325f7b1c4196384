"""benchmarks.compact as a person calls it, at a tiny size, and the gap that it reads from a table of experiments."""

import json
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner

from benchmarks.compact.__main__ import app
from benchmarks.compact.sections import gauc_section
from featurestore import ExtractorSpec, FeatureRows, FeatureStore, StoreInfo
from featurestore.errors import UserError
from featurestore.upkeep.remake import remake

TINY = ["--images", "200", "--dim", "16", "--dims", "4", "--samples-per-rank", "60", "--steps", "4", "--rounds", "1"]


@pytest.fixture
def results(tmp_path: Path) -> Path:
    """A table of two seeds: 32 components take an eighth of the bytes, 128 half of them and lose less."""
    spec = ExtractorSpec(backbone="b", layer="l", weights_digest="0", preprocessing="p", compute_dtype="float32")
    store = FeatureStore.create(tmp_path / "full", StoreInfo(num_shards=1, dim=256, dtype="bfloat16", extractor=spec))
    rows = np.random.default_rng(0).standard_normal((300, 256)).astype(np.float32)
    store.put(FeatureRows.of([f"{n}" for n in range(len(rows))], rows))
    folder = tmp_path / "drawn" / "experiments"
    for dims in (32, 128):
        remake(store, folder / "stores" / f"abc-{dims}-bfloat16", dims=dims, dtype="bfloat16")
    gauc = {"full width": (0.70, 0.72), "32 components, bfloat16": (0.699, 0.717)}
    gauc["128 components, bfloat16"] = (0.70, 0.72)
    runs = {name: [{"gauc": each} for each in values] for name, values in gauc.items()}
    (folder / "results.json").write_text(json.dumps({"compact": {"title": "", "rows": [], "runs": runs}}))
    return folder / "results.json"


@pytest.mark.long
def test_the_gap_is_that_of_the_best_width_within_an_eighth_of_the_bytes(results: Path) -> None:
    figures = gauc_section(results).flat()
    assert figures["compact_gauc_gap_drawn"] == pytest.approx(0.002)
    assert figures["compact_gauc_gap_of_drawn"] == "32 components, bfloat16"
    half_width = 12.706 * 0.001  # Student's t of one degree of freedom times the error of the mean of .001 and .003
    assert figures["compact_gauc_gap_interval_drawn"] == pytest.approx(half_width, rel=1e-3)
    assert figures["drawn_128 components, bfloat16_bytes"] == 0.5
    (results.parent / "other").mkdir()
    with pytest.raises(UserError, match="no table compact"):
        gauc_section(results.parent / "other" / "results.json")


@pytest.mark.slow
def test_both_widths_at_a_tiny_size(tmp_path: Path) -> None:
    out = tmp_path / "compact.json"
    result = CliRunner().invoke(app, [*TINY, "--dir", str(tmp_path / "workload"), "--json", str(out)])
    assert result.exit_code == 0, result.output
    figures = json.loads(out.read_text())
    assert figures["compact_bytes_share"] == 8 / 32
    assert figures["compact_vs_full"] == figures["bfloat16_samples_per_s"] / figures["full_samples_per_s"] > 0
    speed = {name: figures[f"{name}_samples_per_s"] for name in ("bfloat16", "compute", "compute_from_numbers")}
    assert figures["samples_per_s_compact"] == speed["bfloat16"]
    assert figures["step_vs_compute_compact"] == speed["compute"] / speed["bfloat16"] > 0
    assert figures["step_vs_compute_compact_from_numbers"] == speed["compute_from_numbers"] / speed["bfloat16"]
    for name, figure in (("fuxictr", "vs_fuxictr_compact"), ("fuxictr_grouped", "vs_fuxictr_compact_grouped")):
        rival = figures.get(f"{name}_samples_per_s")  # none where FuxiCTR could not be installed
        assert figures[figure] == (rival and speed["bfloat16"] / rival)
