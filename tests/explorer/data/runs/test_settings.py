"""Settings that differ, those that change figures first; and the runs whose images alone differ."""

from dataclasses import replace
from typing import Any

from explorer.data.runs.comparing import differing, image_groups, snapshots, text_of
from explorer.data.runs.folders import RunFacts, State


def run(name: str, images: str, state: State = "finished", **more: Any) -> RunFacts:
    settings = {"model.base": "mlp", "model.images": images, "run.name": name, "train.seed": 0, "optim.lr": 0.001}
    return RunFacts(name=name, state=state, settings=settings | more, report={})


def grouped(*runs: RunFacts) -> list[list[str]]:
    return [[each.name for each in group] for group in image_groups(list(runs))]


def figures(*runs: RunFacts) -> list[str]:
    """The settings in which runs differ, of those that change figures."""
    return [row.name for row in differing(list(runs)) if row.is_figure]


def test_those_that_change_figures_come_first_and_images_at_the_top() -> None:
    rows = differing([run("a", "none", **{"train.log_every": 1}), run("b", "both", **{"optim.lr": 0.01})])
    assert [(row.name, row.values, row.is_figure) for row in rows] == [
        ("model.images", ("none", "both"), True),
        ("optim.lr", ("0.001", "0.01"), True),
        ("run.name", ("a", "b"), False),
        ("train.log_every", ("1", "–"), False),
    ]
    assert figures(run("a", "none"), run("a", "none", **{"train.seed": 1})) == ["train.seed"]


def test_groups_differ_in_their_images_alone() -> None:
    runs = [
        run("both", "both"),
        run("none", "none"),
        run("other", "ad", **{"optim.lr": 0.5}),
        run("ad", "ad"),
        run("older", "ad"),
        run("going on", "behavior", state="running"),
        run("x", "none", **{"optim.lr": 0.5}),
    ]
    assert grouped(*runs) == [["none", "ad", "both"], ["x", "other"]]
    assert grouped(runs[0]) == []


def test_settings_that_a_run_without_images_has_no_use_for_do_not_count_for_it() -> None:
    ids = run("ids", "none", **{"data.missing": "error", "model.pooling": "sum"})
    both = run("both", "both", **{"data.missing": "learned", "model.pooling": "attentive"})
    ad = run("ad", "ad", **{"data.missing": "zeros", "model.pooling": "attentive"})
    assert (grouped(ids, both), figures(ids, both)) == ([["ids", "both"]], ["model.images"])
    assert (grouped(both, ad), figures(both, ad)) == ([], ["model.images", "data.missing"])  # both see images


def test_the_type_of_es_products_counts_for_runs_that_have_an_e() -> None:
    """But float64 is the type of all numbers."""
    ids, both, exact = (
        run(name, images, **{"model.compute_dtype": dtype})
        for name, images, dtype in (
            ("ids", "none", "float32"),
            ("both", "both", "bfloat16"),
            ("ids", "none", "float64"),
        )
    )
    assert (grouped(ids, both), figures(ids, both)) == ([["ids", "both"]], ["model.images"])
    assert (grouped(exact, both), figures(exact, both)) == ([], ["model.images", "model.compute_dtype"])


def elsewhere(name: str, images: str, digest: str, commit: str | None) -> RunFacts:
    """Make a run whose samples and store have an address of their own."""
    places = {"data.samples": f"{name}/samples", "data.store": f"{name}/store", "data.stores.audio": f"{name}/audio"}
    stores = {"images": {"version": 1, "commit_id": commit}} if commit else {}
    made = run(name, images, **places)
    return replace(made, report={"stores": stores}, samples_digest=digest)


def test_what_runs_read_counts_and_not_where_it_was() -> None:
    runs = elsewhere("n", "none", "d1", None), elsewhere("a", "ad", "d1", "c1"), elsewhere("b", "both", "d1", "c1")
    assert (grouped(*runs), figures(*runs), snapshots(list(runs))) == ([["n", "a", "b"]], ["model.images"], [])


def test_other_samples_or_another_snapshot_are_no_difference_of_images() -> None:
    none, ad = elsewhere("n", "none", "d1", None), elsewhere("a", "ad", "d1", "c1")
    both, other = elsewhere("b", "both", "d1", "c2"), elsewhere("o", "behavior", "bytes:d2", "c1")
    assert grouped(none, ad, both, other) == [["n", "a"], ["n", "b"]]
    assert [(row.name, row.values) for row in snapshots([none, other])] == [("digest of the samples", ("d1", "d2"))]


def test_addresses_count_where_nothing_was_recorded() -> None:
    runs = elsewhere("n", "none", "", None), elsewhere("a", "ad", "", None), elsewhere("b", "both", "d1", "c1")
    assert grouped(*runs) == []
    assert {*figures(*runs)} == {"model.images", "data.samples", "data.store", "data.stores.audio"}


def test_values_are_written_as_files_have_them() -> None:
    assert list(map(text_of, (None, True, [256, 64], "x", 0.001))) == ["null", "true", "[256, 64]", "x", "0.001"]


def test_snapshots_that_differ_are_told_where_a_run_reads_the_store() -> None:
    def trained_on(version: int | None) -> RunFacts:
        stores = {} if version is None else {"images": {"version": version, "commit_id": f"{version}" * 32}}
        return RunFacts(name="a", state="finished", settings={}, report={"stores": stores})

    rows = snapshots([trained_on(1), trained_on(None), trained_on(2)])
    assert [(row.name, row.values) for row in rows] == [
        ("snapshot of store images", ("1 (commit 11111111)", "–", "2 (commit 22222222)"))
    ]
    assert snapshots([trained_on(1), trained_on(None), trained_on(1)]) == []
    assert snapshots([RunFacts(name="a", state="finished", settings={}, report={"stores": [3]})]) == []
