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
        a user would click. Every step is a function of `crossmedia`, and a command of the same name does the same.
        Change a number, and marimo runs again what depends on it.
        """
    )
    return (mo,)


@app.cell
def _(mo):
    import io
    import shutil
    from pathlib import Path

    import numpy as np
    import pyarrow.parquet as pq
    from PIL import Image

    import crossmedia as cm

    PLACE = Path(mo.cli_args().get("dir") or Path(__file__).resolve().parents[2] / "data" / "notebook")

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

    return PLACE, as_png, cm, np, pq, sheet, shutil


@app.cell
def _(mo):
    mo.md("""
    ## 1. A small shop

    Clothes in colours and patterns, and people who like some of them. The log of 5 days has what was shown, and
    what was clicked.
    """)


@app.cell
def _(PLACE, as_png, cm, mo, sheet):
    cm.make_demo(PLACE, items=60, users=400, days=5, force=True)
    names = sorted(path.relative_to(PLACE / "images").as_posix() for path in (PLACE / "images").rglob("*.jpg"))
    mo.image(as_png(sheet(names[:40])))
    return (names,)


@app.cell
def _(mo):
    mo.md("""
    ## 2. Features, once per image

    A frozen network turns each picture into numbers. Here it is a small ResNet with random weights, so that nothing has
    to be downloaded; `weights="imagenet"` takes the trained ones. The store is versioned Parquet: a mapping from images
    to features, as of one snapshot.
    """)


@app.cell
def _(PLACE, cm, names, shutil):
    assert names  # the pictures are there
    shutil.rmtree(PLACE / "features", ignore_errors=True)  # those of the pictures before
    store = cm.extract(
        PLACE / "images", PLACE / "features", backbone="resnet18:avgpool", weights="random:0", num_shards=4
    )
    store
    return (store,)


@app.cell
def _(names, store):
    features = store[names]
    features.shape
    return (features,)


@app.cell
def _(mo):
    mo.md("""
    ## 3. Samples

    A row is one user in one session, with the user's clicks before it. It holds keys of images, and neither
    pixels nor features.
    """)


@app.cell
def _(PLACE, cm, features, pq):
    assert len(features)
    cm.build_samples(PLACE / "logs", PLACE / "samples")
    test_rows = pq.read_table(sorted((PLACE / "samples" / "test").glob("*.parquet"))[0]).to_pylist()
    {name: value[:3] if isinstance(value, list) else value for name, value in test_rows[0].items()}
    return (test_rows,)


@app.cell
def _(mo):
    mo.md("""
    ## 4. A short training

    On one rank. A script of this call under `horovodrun -np 2` trains the same model on two, with the same losses.
    """)


@app.cell
def _(PLACE, cm, test_rows):
    assert test_rows
    settings = {"data.global_batch_size": 256, "run.dir": str(PLACE / "runs"), "run.overwrite": True}
    run = cm.train(PLACE / "samples", "both", store=PLACE / "features", name="both", settings=settings)
    run
    return (run,)


@app.cell
def _(run):
    evaluation = run.evaluate(resamples=200)
    print(evaluation)
    evaluation.rows()[0]


@app.cell
def _(mo):
    mo.md("""
    ## 5. A scored request

    The run becomes a model: its network, its ID rows, and the 12 numbers of each image. A request is a user with
    the lists of the candidates' columns; the HTTP server gives the same scores (`cm.Client`).
    """)


@app.cell
def _(PLACE, as_png, mo, names, run, sheet, shutil, test_rows):
    from featurestore import key_of_uri

    shutil.rmtree(PLACE / "model", ignore_errors=True)  # of the run before
    model = run.publish(PLACE / "model")
    name_of = {key_of_uri(name): name for name in names}
    user = max(test_rows, key=lambda row: len(row["behavior_item"]))
    shown = {
        (row["ad_item"][place], row["ad_image"][place], row["ad_category"][place])
        for row in test_rows
        for place in range(len(row["ad_item"]))
    }
    items, images, categories = map(list, zip(*sorted(shown), strict=True))
    request = {column: [value] for column, value in user.items() if column == "user" or column.startswith("behavior_")}
    ads = {"ad_item": [items], "ad_image": [images], "ad_category": [categories]}
    request |= ads | {"ad_scene": [[user["ad_scene"][0]] * len(items)]}
    scores = model.score(request)["probability"].to_pylist()
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
    return images, model, order, request, scores


@app.cell
def _(mo):
    mo.md("""
    ## 6. What would this ad get with another picture?

    The same request, with the picture of the best ad on the last one. All that the model reads of the picture
    changes.
    """)


@app.cell
def _(images, model, order, request, scores):
    worst, best = order[-1], order[0]
    swapped = [images[best] if place == worst else key for place, key in enumerate(images)]
    other = model.score({**request, "ad_image": [swapped]})["probability"].to_pylist()
    print(f"the last ad: {scores[worst]:.4f} with its own picture, {other[worst]:.4f} with that of the best ad")


@app.cell
def _(mo):
    mo.md("""
    ## 7. Neighbours: what did E learn?

    The nearest pictures of the first ones, by the frozen features (left) and by the 12 numbers that E makes of them
    (right). Where the two differ is what the clicks have taught.
    """)


@app.cell
def _(as_png, features, mo, names, np, run, sheet):
    table = run.vectors()
    vector_of = dict(zip(table["uri"].to_pylist(), table["vector"].to_pylist(), strict=True))
    visual = np.array([vector_of[name] for name in names], np.float32)

    def nearest(vectors: np.ndarray, place: int, count: int = 5) -> list[int]:
        """Return the places of the vectors with the largest cosine, the vector itself first."""
        centred = vectors - vectors.mean(0)
        unit = centred / np.linalg.norm(centred, axis=1, keepdims=True)
        return np.argsort(-(unit @ unit[place]), kind="stable")[:count].tolist()

    pairs = [name for place in range(5) for space in (features, visual) for name in (
        names[other] for other in nearest(space, place)
    )]  # fmt: skip
    mo.image(as_png(sheet(pairs)))


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
