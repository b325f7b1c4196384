"""A marimo notebook: from drawn pictures to a scored request, in about a minute."""

import marimo

__generated_with = "0.17.0"
app = marimo.App(width="medium", app_title="From pictures to a scored request")


@app.cell
def _():
    import marimo as mo

    mo.md(
        """
        # From pictures to a scored request

        This notebook draws a small shop, extracts features, trains a model on IDs and images, and asks it which ads
        a user would click. Every step is a command that you could also type; what it prints is below it. Change a
        number, and marimo runs again what depends on it.
        """
    )
    return (mo,)


@app.cell
def _(mo):
    import io
    import json
    import os
    import shlex
    import subprocess
    import sys
    from pathlib import Path

    import numpy as np
    import pyarrow.parquet as pq
    from PIL import Image

    ROOT = Path(__file__).resolve().parents[2]
    PLACE = Path(mo.cli_args().get("dir") or ROOT / "data" / "notebook")

    def run(*words: object) -> str:
        """Run one Python command of the project, and return what it prints."""
        command = [sys.executable, *map(str, words)]
        print("$ python", shlex.join(command[1:]), flush=True)
        environment = os.environ | {"COLUMNS": "110", "PYTHONPATH": str(ROOT)}
        done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
        print(done.stdout, flush=True)
        if done.returncode != 0:
            raise RuntimeError(done.stderr)
        return done.stdout

    def sheet(names: list[str], columns: int = 10, side_px: int = 72) -> Image.Image:
        """Lay pictures out in rows, by their names below the folder of images."""
        rows = -(-len(names) // columns)
        page = Image.new("RGB", (columns * side_px, rows * side_px), "white")
        for place, name in enumerate(names):
            with Image.open(PLACE / "images" / name) as picture:
                small = picture.convert("RGB").resize((side_px - 4, side_px - 4))
            page.paste(small, (place % columns * side_px + 2, place // columns * side_px + 2))
        return page

    def as_png(picture: Image.Image) -> bytes:
        """Return a picture as the bytes of a PNG file."""
        buffer = io.BytesIO()
        picture.save(buffer, "PNG")
        return buffer.getvalue()

    return PLACE, as_png, json, np, pq, run, sheet


@app.cell
def _(mo):
    mo.md("""
    ## 1. A small shop

    Clothes in colours and patterns, and people who like some of them. The log of 5 days has what was shown, and
    what was clicked.
    """)


@app.cell
def _(PLACE, as_png, mo, run, sheet):
    NUM_ITEMS, NUM_USERS, NUM_DAYS = 60, 400, 5
    run(
        "jobs/make_demo_data.py",
        "--out",
        PLACE,
        "--items",
        NUM_ITEMS,
        "--users",
        NUM_USERS,
        "--days",
        NUM_DAYS,
        "--force",
    )
    names = sorted(path.relative_to(PLACE / "images").as_posix() for path in (PLACE / "images").rglob("*.jpg"))
    mo.image(as_png(sheet(names[:40])))
    return (names,)


@app.cell
def _(mo):
    mo.md("""
    ## 2. Features, once per image

    A frozen network turns each picture into numbers. Here it is a small ResNet with random weights, so that nothing has
    to be downloaded; `--weights imagenet` takes the trained ones. The store is versioned Parquet.
    """)


@app.cell
def _(PLACE, names, np, run):
    import shutil

    from featurestore import FeatureStore, key_of_uri

    assert names  # the pictures are there
    shutil.rmtree(PLACE / "features", ignore_errors=True)  # those of the pictures before
    run(
        "jobs/extract_features.py", "--images", PLACE / "images", "--store", PLACE / "features",
        "--backbone", "resnet18:avgpool", "--weights", "random:0", "--num-shards", 4,
    )  # fmt: skip
    snapshot = FeatureStore.open(PLACE / "features").snapshot()
    keys = np.array([key_of_uri(name) for name in names])
    features = snapshot.codec.decode(snapshot.get(keys))
    print(f"snapshot {snapshot.version}: {snapshot.num_rows} images of {features.shape[1]} numbers")
    return features, key_of_uri, keys


@app.cell
def _(mo):
    mo.md("""
    ## 3. Samples

    A row is one user in one session, with the user's clicks before it. It holds keys of images, and neither
    pixels nor features.
    """)


@app.cell
def _(PLACE, features, pq, run):
    assert len(features)
    run("jobs/build_samples.py", "--logs", PLACE / "logs", "--samples", PLACE / "samples")
    test_rows = pq.read_table(sorted((PLACE / "samples" / "test").glob("*.parquet"))[0]).to_pylist()
    {name: value[:3] if isinstance(value, list) else value for name, value in test_rows[0].items()}
    return (test_rows,)


@app.cell
def _(mo):
    mo.md("""
    ## 4. A short training

    On one rank. `horovodrun -np 2 crossmedia train ...` trains the same model on two, with the same losses.
    """)


@app.cell
def _(PLACE, json, run, test_rows):
    assert test_rows
    settings = {
        "data.samples": PLACE / "samples",
        "data.store": PLACE / "features",
        "data.global_batch_size": 256,
        "run.dir": PLACE / "runs",
        "run.name": "both",
        "run.overwrite": "true",
        "model.images": "both",
        "train.epochs": 2,
    }
    run("-m", "trainer.main", "--set", *(f"{name}={value}" for name, value in settings.items()))
    report = json.loads((PLACE / "runs" / "both" / "report.json").read_text())
    {name: report["metrics"][name] for name in ("auc", "gauc", "logloss")}
    return (report,)


@app.cell
def _(mo):
    mo.md("""
    ## 5. A scored request

    The run becomes a model: its network, its ID rows, and the 12 numbers of each image. `Scorer` is what the HTTP
    server uses too.
    """)


@app.cell
def _(PLACE, as_png, key_of_uri, mo, names, report, run, sheet, test_rows):
    from serving.scoring.request import Request
    from serving.scoring.scorer import Scorer

    assert report
    run("jobs/export_model.py", "--run", PLACE / "runs" / "both", "--out", PLACE / "model")
    name_of = {key_of_uri(name): name for name in names}
    user = max(test_rows, key=lambda row: len(row["behavior_item"]))
    shown = {
        (row["ad_item"][place], row["ad_image"][place], row["ad_category"][place])
        for row in test_rows
        for place in range(len(row["ad_item"]))
    }
    items, images, categories = map(list, zip(*sorted(shown), strict=True))
    request = Request(
        user={column: value for column, value in user.items() if column == "user" or column.startswith("behavior_")},
        candidates={"ad_item": items, "ad_image": images, "ad_category": categories},
        context={"ad_scene": user["ad_scene"][0]},
    )
    scorer = Scorer.open(str(PLACE / "model"))
    scores = scorer.score([request])[0].probabilities()
    order = sorted(range(len(scores)), key=lambda place: -scores[place])
    history = [name_of[key] for key in user["behavior_image"]]
    mo.vstack(
        [
            mo.md(f"User {user['user']} clicked these before:"),
            mo.image(as_png(sheet(history[:10]))),
            mo.md(f"The ten best of {len(scores)} ads, from {scores[order[0]]:.3f} to {scores[order[9]]:.3f}:"),
            mo.image(as_png(sheet([name_of[images[place]] for place in order[:10]]))),
            mo.md(f"The ten last, down to {scores[order[-1]]:.3f}:"),
            mo.image(as_png(sheet([name_of[images[place]] for place in order[-10:]]))),
        ]
    )
    return images, name_of, order, request, scorer, scores


@app.cell
def _(mo):
    mo.md("""
    ## 6. What would this ad get with another picture?

    The same request, with the picture of the best ad on the last one. All that the model reads of the picture
    changes.
    """)


@app.cell
def _(images, order, request, scorer, scores):
    from dataclasses import replace

    worst, best = order[-1], order[0]
    swapped = [images[best] if place == worst else key for place, key in enumerate(images)]
    other = replace(request, candidates={**request.candidates, "ad_image": swapped})
    score_before, score_after = scores[worst], scorer.score([other])[0].probabilities()[worst]
    print(f"the last ad: {score_before:.4f} with its own picture, {score_after:.4f} with that of the best ad")
    return score_after, score_before


@app.cell
def _(mo):
    mo.md("""
    ## 7. Neighbours: what did E learn?

    The nearest pictures of the first ones, by the frozen features (left) and by the 12 numbers that E makes of them
    (right). Where the two differ is what the clicks have taught.
    """)


@app.cell
def _(PLACE, as_png, features, keys, mo, np, pq, report, run, sheet, names):
    assert report
    run("jobs/export_embeddings.py", "--run", PLACE / "runs" / "both", "--out", PLACE / "visual.parquet")
    table = pq.read_table(PLACE / "visual.parquet")
    vector_of = dict(zip(table["key"].to_pylist(), table["vector"].to_pylist(), strict=True))
    visual = np.array([vector_of[key] for key in keys.tolist()], np.float32)

    def nearest(vectors: np.ndarray, place: int, count: int = 5) -> list[int]:
        """Return the places of the vectors with the largest cosine, the vector itself first."""
        centred = vectors - vectors.mean(0)
        unit = centred / np.linalg.norm(centred, axis=1, keepdims=True)
        return np.argsort(-(unit @ unit[place]), kind="stable")[:count].tolist()

    pairs = [name for place in range(5) for space in (features, visual) for name in (
        names[other] for other in nearest(space, place)
    )]  # fmt: skip
    mo.image(as_png(sheet(pairs)))
    return (visual,)


@app.cell
def _(PLACE, mo):
    mo.md(f"""
    ## Next

    - The same model over HTTP: `crossmedia serve {PLACE / "model"} --port 8080`, and docs/SERVE.md for requests.
    - All of this as pages: `crossmedia explore --store {PLACE / "features"} --runs {PLACE / "runs"}
      --samples {PLACE / "samples"} --images {PLACE / "images"}`
    - Your own data: docs/OWN_DATA.md.
    """)


if __name__ == "__main__":
    app.run()
