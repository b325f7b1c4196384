"""The same work from Python as by the commands: stores, runs, models, servers and datasets, on a small run."""

import json
import pickle
import re
import shutil
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from torch.utils.data import DataLoader

import crossmedia as cm
from featurestore.errors import ImageNameError, MissingKeysError, UserError
from featurestore.format.datafile import FeatureRows
from featurestore.keys import key_of_uri
from featurestore.problems import Problem as StoreProblem
from featurestore.storage.storage import Storage
from featurestore.store import FeatureStore
from pipeline.problems import Problem as SampleProblem
from serving.bundle.log import version_in_use
from serving.problems import Problem as ServingProblem
from tests.cli import ran
from tests.commands.calls import ROOT
from tests.raised import raises, told
from tests.ranks import StandingRanks
from tests.trainer.conftest import Places, make_places, nothing_drawn
from trainer.errors import ConfigError, DataError
from trainer.evaluation import bootstrap
from trainer.evaluation.predict import predict_run
from trainer.problems import Problem
from trainer.schema.profile import table_of


@pytest.fixture(scope="module")
def places(tmp_path_factory: pytest.TempPathFactory) -> Places:
    return make_places(tmp_path_factory.mktemp("facade"))


def settings_of(places: Places, steps: int, **more: str) -> dict[str, str]:
    return dict(each.split("=", 1) for each in places.settings(train__max_steps=steps, data__missing="zeros", **more))


@pytest.fixture(scope="module")
def run(places: Places) -> cm.Run:
    settings = settings_of(places, 3, model__compute_dtype="float32")
    return cm.train(places.folder / "samples", images="both", name="both", settings=settings)


@pytest.fixture(scope="module")
def model(places: Places, run: cm.Run) -> Iterator[cm.Model]:
    with run.publish(str(places.folder / "models" / "ctr")) as opened:
        yield opened


@pytest.fixture(scope="module")
def groups(places: Places) -> pa.Table:
    """Test samples, a row for each group."""
    return pq.read_table(places.folder / "samples" / "test", partitioning=None)


@pytest.fixture(scope="module")
def impressions(groups: pa.Table) -> pa.Table:
    """The same, a row for each impression, without labels and with a column that no model has."""
    rows = []
    for group in groups.drop_columns(["label"]).to_pylist():
        rows += [
            {name: value[place] if name.startswith("ad_") else value for name, value in group.items()}
            for place in range(len(group["ad_item"]))
        ]
    return pa.Table.from_pylist(rows).append_column("banner", pa.array(["left"] * len(rows)))


def test_the_facade_is_quick_to_import() -> None:
    code = "import sys, crossmedia; dir(crossmedia); sys.exit('torch' in sys.modules or 'pyarrow' in sys.modules)"
    assert ran(sys.executable, "-c", code, cwd=ROOT).returncode == 0
    assert sorted(dir(cm)) == sorted(cm.__all__) and all(getattr(cm, name) for name in cm.__all__)
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = cm.nothing


def test_features_by_uri_key_and_arrays(places: Places, tmp_path: Path) -> None:
    store = cm.open_store(places.folder / "features")
    stored = FeatureStore.open(places.folder / "features").snapshot()
    assert store[1_003].shape == (16,) and store[1_003].dtype == np.float32
    wanted = stored.codec.decode(stored.get([1_004, 1_003]))
    for keys in ([1_004, 1_003], np.array([1_004, 1_003]), pa.array([1_004, 1_003]), torch.tensor([1_004, 1_003])):
        np.testing.assert_array_equal(store[keys], wanted)
    assert 1_003 in store and key_of_uri("item/3") not in store and "item/3" not in store
    assert len(store) == 50 and store.to_arrow().num_rows == 50
    assert repr(store).endswith("rows=50, version=1, dim=16, dtype=float32)")
    assert "<th>rows</th><td>50</td>" in store._repr_html_()
    assert "<th>version</th><td>1</td>" in store._repr_html_()
    assert "version=1" in repr(stored) and "<th>operation</th>" in stored._repr_html_()
    where = f"snapshot 1 of {places.folder}/features"
    with raises(MissingKeysError, StoreProblem.NO_FEATURE, number=1, where=where, value="item/3"):
        store["item/3"]
    with raises(ImageNameError, StoreProblem.NOT_AN_IMAGE_NAME):
        store[[1.5]]
    made = FeatureStore.create(tmp_path / "named", FeatureStore.open(places.folder / "features").info)
    made.put(FeatureRows.of(["bag/1.jpg"], np.ones((1, 16), np.float32)))
    assert cm.open_store(tmp_path / "named")["bag/1.jpg"].tolist() == [1.0] * 16, "a uri is hashed"


def test_a_run_is_trained_and_found_again_and_has_a_vector_of_each_image(run: cm.Run, places: Places) -> None:
    assert run.config.model.images == "both" and run.report["global_step"] == 3
    assert 0 < run.metrics["auc"] < 1 and run.metrics["users"] < bootstrap.LEAST_USERS_SHOWN
    assert "auc" not in repr(run), "of so few users no metric is shown"
    report = run.report
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cm.Run, "report", {**report, "metrics": {**run.metrics, "users": bootstrap.LEAST_USERS_SHOWN}})
        assert f" auc={run.metrics['auc']:.4f}" in repr(run) and "gauc" not in repr(run)
        assert "<th>auc</th>" in run._repr_html_()
    assert cm.open_run(run.folder).metrics == run.metrics
    with raises(ConfigError, Problem.NOT_A_RUN, where="nowhere"):
        cm.Run("nowhere")
    with raises(ConfigError, Problem.NOT_A_RUN, where=places.folder / "samples"):
        cm.open_run(places.folder / "samples")
    with pytest.raises(ConfigError, match=told(Problem.SETTING_UNKNOWN, where="model.imagse")):
        cm.train(places.folder / "samples", settings={"model.imagse": "both"})
    found = run.vectors()
    assert sorted(found["key"].to_pylist()) == list(range(1_000, 1_050))
    assert {len(each) for each in found["vector"].to_pylist()} == {run.config.model.visual_width}


def test_an_evaluation_has_a_row_for_each_slice(
    run: cm.Run, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    capsys.readouterr()
    with nothing_drawn(), pytest.warns(UserWarning, match="metrics are given of 30 users or more"):
        few = run.evaluate(resamples=10, out=tmp_path / "evaluation")
    assert {each["auc"] for each in few.rows()} == {None} and not re.search(r"\d\.\d", few._repr_html_())
    monkeypatch.setattr(bootstrap, "LEAST_USERS_SHOWN", 1)
    with nothing_drawn():
        found = run.evaluate(resamples=10, out=tmp_path / "evaluation")
    assert capsys.readouterr().out == ""
    whole, *slices = found.rows()
    assert whole["impressions"] == sum(each["impressions"] for each in slices if each["slicing"] == "ad_impressions")
    first, last = list(found.table)[:2], list(found.table)[-2:]  # what pandas shows where the others have no room
    assert (first, last) == (["auc", "gauc"], ["users", "impressions"])
    assert whole["auc_low"] <= whole["auc"] <= whole["auc_high"]
    assert repr(found) == f"Evaluation({whole['impressions']} impressions, {len(slices)} slices)"
    pytest.importorskip("pandas")
    assert found.table.loc[("", "all"), "auc"] == whole["auc"]
    assert "<table" in found._repr_html_()


@pytest.mark.long
def test_scores_are_those_of_the_run_model_and_kind_of_rows(
    run: cm.Run, model: cm.Model, groups: pa.Table, impressions: pa.Table, places: Places, tmp_path: Path
) -> None:
    """Also where the training samples are gone."""
    wanted = predict_run(run.folder).logit_N
    for scored in (run.score(groups), run.score(impressions), model.score(groups), model.score(impressions)):
        np.testing.assert_allclose(scored["logit"].to_numpy(), wanted, atol=1e-5)
        np.testing.assert_allclose(scored["probability"].to_numpy(), 1 / (1 + np.exp(-wanted)), atol=1e-5)
    assert version_in_use(Storage(model.scorer.storage.url)) == 1
    assert "run=" in repr(model) and "<table>" in model._repr_html_() and model.version == 1
    config = Path(shutil.copytree(str(run.folder), tmp_path / "copy")) / "config.yaml"
    config.write_text(config.read_text().replace(str(places.folder / "samples"), str(tmp_path / "gone")))
    copy = cm.open_run(tmp_path / "copy")
    assert copy.config.data.samples == str(tmp_path / "gone")
    assert copy.score(impressions).equals(run.score(impressions))


def test_tables_of_all_kinds(run: cm.Run, impressions: pa.Table) -> None:
    few = impressions.slice(0, 5)
    wanted = run.score(few)
    columns: dict[str, Any] = {
        name: few[name].to_pylist() if name.startswith("behavior") else few[name].to_numpy(zero_copy_only=False)
        for name in few.column_names
    }
    columns["ad_item"] = torch.tensor(columns["ad_item"])
    assert run.score(columns).equals(wanted)
    assert run.score(few.combine_chunks().to_batches()[0]).equals(wanted)
    assert table_of({"numbers": np.ones((2, 3))})["numbers"].to_pylist() == [[1.0] * 3] * 2
    assert run.score(few.slice(0, 0)).num_rows == 0
    assert run.score({"sku": []}, {"sku": []}).num_rows == 0, "a raw log of nobody"
    histories: dict[str, Any] = {name: [[]] for name in few.column_names if name.startswith("behavior")}
    nobody = {name: few[name].to_pylist()[:1] for name in few.column_names} | histories
    assert run.score(nobody).num_rows == 1, "a list without a value has no type in Arrow"
    without_ads = [name for name in few.column_names if not name.startswith("ad_")]
    lacking = {"lacking": 7, "total": 8, "missing": re.compile("behavior_item, .*")}
    for table, message in (
        ([1, 2], told(Problem.NOT_A_TABLE, value="list")),
        ({"user": [1], "ad_item": [1, 2]}, told(Problem.REFUSED, action="read", where="the table")),
        (few.drop_columns(["ad_item"]), told(Problem.COLUMN_MISSING, column="ad_item")),
        ({"user": [1]}, told(Problem.ROWS_LACK_COLUMNS, **lacking)),
        (few.select(without_ads), told(Problem.ROWS_WITHOUT_ADS, wanted="ad_item")),
    ):
        with pytest.raises(UserError, match=message):
            run.score(table)


@pytest.mark.long
def test_a_data_frame_keeps_its_index(run: cm.Run, model: cm.Model, impressions: pa.Table, groups: pa.Table) -> None:
    pd, few = pytest.importorskip("pandas"), impressions.slice(0, 5)
    for scorer in (run, model):
        scored = scorer.score(few.to_pandas().set_index(pd.Index(list("abcde"))))
        assert list(scored.index) == list("abcde") and list(scored.columns) == ["logit", "probability"]
        np.testing.assert_allclose(scored["logit"], scorer.score(few)["logit"].to_numpy())
    lengths = [len(ads) for ads in groups.to_pydict()["ad_item"]]
    assert list(run.score(groups.slice(0, 2).to_pandas()).index) == [0] * lengths[0] + [1] * lengths[1]
    assert cm.open_store(run.config.data.store).to_pandas().shape[0] == 50


@pytest.mark.usefixtures("connected")
def test_samples_are_made_of_tables(tmp_path: Path) -> None:
    """They are written next to the samples, those before replaced; their mapping stays as it is."""
    times = [1_767_225_600 + 43_200 * at for at in range(8)]
    log = {"ts": times, "user_id": ["ann", "bob"] * 4, "sku": ["a", "b", "c", "d"] * 2, "clicked": [1, 0, 0, 1] * 2}
    made = cm.build_samples(pa.table(log), tmp_path / "samples")
    assert (made["impressions"]["kept"], made["behaviors"]["rows"]) == (8, 4)
    mapping = tmp_path / "samples-logs/mapping.yaml"
    assert "label: clicked" in mapping.read_text() and (tmp_path / "samples/settings.yaml").is_file()
    mapping.write_text(mapping.read_text().replace("log.parquet", "shown.parquet"))
    made = cm.build_samples({"shown": pa.table(log).slice(0, 6)}, tmp_path / "samples")
    assert made["impressions"]["kept"] == 6
    gone, liked = {"where": re.compile(r"/shown\.parquet$")}, {"value": "liked", "found": "clicked"}
    for tables, options, problem, values in (
        ({"other": pa.table(log)}, {}, SampleProblem.NO_MAPPED_FILES, gone),
        ({"shown": pa.table(log)}, {"label": "liked"}, Problem.MAPPED_LABEL_DIFFERS, liked),
    ):
        with raises(UserError, problem, **values):
            cm.build_samples(tables, tmp_path / "samples", **options)
        (kept,) = tmp_path.glob("samples-logs*/*.parquet")
        assert kept.name == "shown.parquet" and pq.read_metadata(kept).num_rows == 6
    odd = pa.table({"bought" if name == "clicked" else name: each for name, each in log.items()} | {"gift": [0, 1] * 4})
    with raises(DataError, Problem.NO_LABEL_KNOWN, known="log.parquet: ts, user_id, sku, bought, gift"):
        cm.build_samples(odd, tmp_path / "odd")
    for _ in range(2):  # with the mapping that was guessed, too
        assert cm.build_samples(odd, tmp_path / "odd", label="bought")["impressions"]["kept"] == 8


@pytest.mark.services
def test_a_server_gives_the_scores_of_its_model(model: cm.Model, impressions: pa.Table, groups: pa.Table) -> None:
    from crossmedia.demo_serving import running
    from trainer.launch import free_port

    port, url = free_port(), model.scorer.storage.url
    with running(["-m", "crossmedia", "serve", url, "--port", str(port)], port, "/v2/health/ready", ROOT):
        client = cm.Client(address := f"http://127.0.0.1:{port}")
        assert client.score(impressions).equals(model.score(impressions))
        assert client.score(groups).equals(model.score(groups))
        assert repr(client) == f"Client('{address}')"
        for scorer in (model, client):
            with raises(DataError, Problem.ROWS_LACK_COLUMNS, lacking=8, total=8):
                scorer.score({"user_id": [1], "sku": [2]})
        missing = re.compile(f"^{told(ServingProblem.NO_COLUMN, where='column ', column='ad_item')}")  # and no JSON
        with raises(UserError, ServingProblem.ANSWERS, where=address, status=400, reason=missing):
            client.score(impressions.drop_columns(["ad_item"]))
    with raises(UserError, ServingProblem.NO_ANSWER, where=address):
        client.score(groups)


def test_datasets_of_features_and_samples(places: Places, groups: pa.Table) -> None:
    store = cm.open_store(places.folder / "features")
    dataset = store.dataset(str(places.folder / "cache"))
    key, feature = dataset[3]
    np.testing.assert_array_equal(feature.numpy(), store[key])
    again = pickle.loads(pickle.dumps(dataset))
    batches = list(DataLoader(again, batch_size=20))
    assert len(dataset) == 50 and [len(keys) for keys, _ in batches] == [20, 20, 10]
    np.testing.assert_array_equal(batches[0][1].numpy(), store[batches[0][0]])
    samples = str(places.folder / "samples")
    test = cm.SampleDataset(samples, "test", batch_size=32)
    label = torch.cat([batch["label"] for batch in DataLoader(test, batch_size=None)])
    assert label.tolist() == [each for labels in groups.to_pydict()["label"] for each in labels]
    assert len(test) == -(-len(label) // 32)
    batch = next(iter(test))
    values, lengths = batch["behavior_item"]
    assert int(lengths.sum()) == len(values) and int(batch["group_of_sample"].max()) + 1 == len(lengths)  # type: ignore[union-attr]
    shuffled = cm.SampleDataset(samples, "train", batch_size=32, seed=1)
    assert sum(len(each["label"]) for each in shuffled) == shuffled.index.num_samples


RANKS = """
import sys, json
import crossmedia as cm
folder, settings = sys.argv[1], json.loads(sys.argv[2])
run = cm.train(f"{folder}/samples", images="both", name="two", settings=settings)
print("rank has", len(run.evaluate(resamples=0).rows()), round(run.metrics["auc"], 6))
"""


def test_training_on_two_ranks_gives_each_the_run(places: Places, tmp_path: Path, two_ranks: StandingRanks) -> None:
    script = tmp_path / "train.py"
    script.write_text(RANKS)
    settings = json.dumps(settings_of(places, 2))
    (code, one), (other_code, other) = two_ranks.call(script, places.folder, settings)
    assert (code, other_code) == (0, 0), one + other
    found = [re.findall("^rank has .*", said, re.MULTILINE) for said in (one, other)]
    assert len(found[0]) == 1 and found[0] == found[1]


def test_scores_of_missing_images_warn_with_their_number(run: cm.Run, impressions: pa.Table, tmp_path: Path) -> None:
    assert run.saved().missing_met == 0
    unknown = pa.array(np.arange(2**40, 2**40 + len(impressions)))
    lacking = impressions.set_column(impressions.column_names.index("ad_image"), "ad_image", unknown)
    with pytest.warns(UserWarning, match=rf"has never met an image .*\({len(impressions):,} lookups\)") as told:
        run.score(lacking)
    ours = [each for each in told if "never met" in str(each.message)]
    assert [Path(each.filename) for each in ours] == [Path(__file__)]
    with warnings.catch_warnings():
        warnings.filterwarnings("error", "the run was trained")
        run.score(impressions)
