"""Record what the code computes, and name what a later commit computes differently.

    python -m tools.reference record FILE.json
    python -m tools.reference compare FILE.json

Record on the commit before a large change, and compare on any commit after it, on the same machine: bits depend on the
processor and on torch. Everything runs in one thread, in float32 or float64. A record has these sections:

scenarios  Every run of tests/trainer/equivalence on one rank, and a few on two: all losses bit for bit, and digests of
           the first gradients and of what is trained. A digest is of a group of tensors (`model.mlp`, `item/weight`)
           in any order, so that a tensor renamed within its group changes `names` alone.
files      What the demo's commands write for a tiny catalogue: logs, samples, stores, checkpoints, a bundle, scores.
           Logs and samples are compared by bytes and by column. Other files have times and random ids in them, and in
           their names: tables are compared by column, JSON and YAML by value, safetensors by group, an exported network
           by its weights. Hexadecimal texts of 32 digits and more become `*`; keys in VOLATILE are left out.
figures    Metrics of two trainings there, on one rank and on two, and of an evaluation, to four digits.
settings   All settings of each of CONFIGURATIONS. One that is refused is printed and left out.

A scenario, a configuration or a setting that is gone or new is listed, but does not count as a difference. Times are
not recorded: they depend on what else the machine does. `make bench` measures them.
"""

import contextlib
import hashlib
import json
import os
import pickle
import platform
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections import defaultdict
from collections.abc import Iterable, Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import typer
import yaml

ROOT, BIN = Path(__file__).resolve().parent.parent, Path(sys.executable).parent
Entries = dict[str, dict[str, str]]
"""A section: entry (a scenario, a file, a configuration) -> key -> value."""
VOLATILE = {"time_s", "seconds", "writer", "bytes", "file_bytes"}
"""Keys of JSON whose values belong to one run: times, processes, sizes of files with random ids in them."""
KEPT = "logs images samples features compact models runs/*/checkpoints/files runs/*/config.yaml scores.parquet"
"""Files and folders that are read."""
RAW = ("logs/", "samples/")
"""Folders whose files have the same bytes in every run."""
MAY_GO = ("scenarios", "settings")
"""Sections whose entries may be gone or new."""
MOST_KEYS, MOST_CHARACTERS = 6, 70
"""Further names in a line, and length of a value."""
TWO_RANKS = (
    "horovodrun --gloo -np 2 python" if (BIN / "horovodrun").exists() else "torchrun --standalone --nproc-per-node 2"
)
"""--gloo: without it, horovodrun first looks for MPI."""
ON_DASK = "dask-submit -n 1 --threads-per-worker 1 jobs"
NETWORK = "--weights random:1 --backbone mobilenet_v3_small:avgpool --precision float32"
SET = (
    "--set run.dir=runs --set run.threads=1 --set model.compute_dtype=float32 --set train.checkpoint_every_s=null "
    "--set data.samples=samples --set data.cache_dir=cache --set data.global_batch_size=128 --set run.name"
)
LATER = (
    f"{ON_DASK}/refresh_features.py --images images --store features --weights random:1",
    "python -m featurestore remake features compact --dims 8",
    f"{ON_DASK}/build_samples.py --logs logs --samples samples --behavior-age",
    f"python -m trainer.main {SET}=one --set data.store=features",
    f"{TWO_RANKS} -m trainer.main {SET}=two --set data.store=compact --set model.base=din --set model.id_dropout=0.2 "
    "--set 'model.tables.item={kind: exact, max_rows: 100, admit_after: 2}' --set data.missing=zeros",
    "python -m trainer.evaluate runs/one --out evaluation",
    "python jobs/export_model.py --run runs/one --out models/ctr",
    "python jobs/score.py --model models/ctr --samples samples --out scores.parquet",
)
"""Commands that run after images were added, changed and removed."""
CONFIGURATIONS = (
    "",
    "model.images=none",
    "model.images=ad; model.base=lr",
    "model.base=din; model.dropout=0.1",
    "model.base=dcn; model.cross_layers=2",
    "model.base=finalmlp; model.mlp=[64,32]",
    "model.base=two_tower; model.tower_width=16; model.pooling=sum",
    "model.pooling=concat; model.pooling_length=8; model.multi_hot=sum",
    "model.pooling=multi_query; model.visual_width=8",
    "model.image_dropout=0.2; model.id_dropout=0.1; model.id_proxy=true",
    "model.tables.item={kind: exact, max_rows: 1000, admit_after: 2, expire_days: 30}; model.table_shards=8",
    "model.activation=prelu; data.global_batch_size=60000; optim.ids=rowwise_adagrad",
    "optim.ids=rowwise_adagrad; optim.ids_lr=null; optim.warmup_steps=100",
    "run.name=a; run.resume=auto; run.warm_start=data/runs/b; run.warm_parts=all; run.device=cpu; run.deadline_s=60",
    "data.train_days=[2026-01-01]; data.test_days=[]; data.stores.texts=data/texts; data.missing=zeros; train.seed=3",
)

app = typer.Typer(add_completion=False, help=(__doc__ or "").partition("\n")[0])


def run(line: str, folder: Path) -> None:
    """Run a command in a folder, in one thread; where it fails, print its output and exit with 2."""
    print("$", line, file=sys.stderr)
    threads = dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"), "1")
    places = {"PATH": f"{BIN}{os.pathsep}{os.environ.get('PATH', '')}", "PYTHONPATH": str(ROOT)}
    variables = {**os.environ, **threads, **places}
    done = subprocess.run(shlex.split(line), cwd=folder, env=variables, capture_output=True, text=True, check=False)
    if done.returncode:
        print(done.stdout[-3000:], done.stderr[-6000:], f"exit code {done.returncode}", sep="\n", file=sys.stderr)
        raise typer.Exit(2)


def digest(data: bytes | str) -> str:
    """Compute the first 64 bits of a sha256, in hexadecimal."""
    return hashlib.sha256(data.encode() if isinstance(data, str) else data).hexdigest()[:16]


def digests_of(tensors: dict[str, Any], prefix: str = "") -> dict[str, str]:
    """Compute a digest for each group of tensors, of the values in any order, and one of all names."""
    import torch

    groups: dict[str, list[str]] = defaultdict(list)
    for name, value in tensors.items():
        group = ".".join(name.split(".")[:2]) if "." in name else re.sub(r"/\d{4}/", "/", name)
        content = value.detach().reshape(-1).contiguous().view(torch.uint8).numpy().tobytes()
        groups[group].append(digest(f"{value.dtype}{tuple(value.shape)}".encode() + content))
    found = {"names": digest("\n".join(sorted(tensors)))}
    found |= {group: digest("".join(sorted(each))) for group, each in groups.items()}
    return {prefix + group: each for group, each in found.items()}


def scenarios(folder: Path) -> dict[str, Entries]:
    """Run the jobs of the equivalence test: all scenarios on one rank, which makes their stores, then a few on two."""
    found = Entries()
    for label, launcher, part in (("", "python", "all"), (" on 2 ranks", TWO_RANKS, "few")):
        run(f"{launcher} tests/trainer/equivalence/worker.py store {part}.pickle {part}", folder)
        for name, result in pickle.loads((folder / f"{part}.pickle").read_bytes()).items():
            if "losses_P" in result:
                losses = {f"loss {step}": float(each).hex() for step, each in enumerate(result["losses_P"][0], 1)}
                tensors = digests_of(result["gradients"], "gradients ") | digests_of(result["trained"], "trained ")
                calls = {"collectives": " ".join(f"{call}={count}" for call, count in sorted(result["calls"].items()))}
                found[name + label] = losses | tensors | calls
    return {"scenarios": found}


def world(folder: Path) -> dict[str, Entries]:
    """Run the demo's commands on a catalogue of 60 items, and read all files that they write."""
    run("python jobs/make_demo_data.py --out . --items 60 --users 200 --days 6 --seed 1", folder)
    images = sorted((folder / "images").rglob("*.jpg"))
    for image in images:
        os.utime(image, (1e9, 1e9))  # the store keeps the time of each file
    later = [image.rename(folder / image.name) for image in images[:5]]
    run(f"{ON_DASK}/extract_features.py --images images --store features {NETWORK} --num-shards 4", folder)
    for place, image in zip(images, later, strict=False):
        image.rename(place)
    shutil.copy2(images[10], images[11])
    images[12].unlink()
    for line in LATER:
        run(line, folder)
    figures = {"evaluation": four_digits((folder / "evaluation" / "report.json").read_text())}
    for name in ("one", "two"):
        figures[name] = four_digits((folder / f"runs/{name}/report.json").read_text())["metrics"]
    return {"files": files_of(folder), "figures": {name: dict(leaves(each, folder)) for name, each in figures.items()}}


def four_digits(text: str) -> Any:
    """Read JSON, real numbers with four digits after the point."""
    return json.loads(text, parse_float=lambda number: round(float(number), 4))


def files_of(folder: Path) -> Entries:
    """Read every file of KEPT; images belong to the entry of their folder."""
    found, by_name = Entries(), defaultdict[str, list[dict[str, str]]](list)
    tops = [top for kept in KEPT.split() for top in folder.glob(kept)]
    for path in sorted(path for top in tops for path in (top, *top.rglob("*")) if path.is_file()):
        name = without_ids(str(path.relative_to(folder)), folder)
        if path.suffix == ".jpg":
            found.setdefault(str(Path(name).parent), {})[path.name] = digest(path.read_bytes())
        elif "reports" not in path.parts:  # what an extraction has cost
            raw = {"bytes": digest(path.read_bytes())} if name.startswith(RAW) else {}
            by_name[name].append(parts_of(path, folder) | raw)
    for name, files in by_name.items():  # files of one name had an id in it, and are ordered by their content
        for number, parts in enumerate(sorted(files, key=lambda parts: json.dumps(parts, sort_keys=True)), 1):
            found[name if number == 1 else f"{name} ({number})"] = parts
    return found


def parts_of(path: Path, folder: Path) -> dict[str, str]:
    """Read a file by its format, as values or digests of its parts."""
    if path.suffix == ".parquet":
        return columns_of(path, folder)
    if path.suffix in (".json", ".yaml"):
        return dict(leaves(yaml.safe_load(path.read_text()), folder))
    if path.suffix == ".safetensors":
        from safetensors.torch import load_file

        return digests_of(load_file(path))
    if path.suffix == ".pt2":  # beside its weights, it has paths and lines of the source
        with zipfile.ZipFile(path) as archive:
            weights = [archive.read(name) for name in archive.namelist() if re.search(r"/weight_\d+$", name)]
        return {"weights": digest("".join(sorted(map(digest, weights))))}
    return {"content": digest(path.read_bytes())}


def columns_of(path: Path, folder: Path) -> dict[str, str]:
    """Read a Parquet file: a digest of each column, their types and order, row groups, and metadata."""
    import pyarrow.parquet as pq

    with pq.ParquetFile(path) as file:
        table, groups = file.read(), [file.metadata.row_group(number) for number in range(file.num_row_groups)]
    parts = {"columns": ", ".join(f"{each.name}: {each.type}{'' if each.nullable else '!'}" for each in table.schema)}
    parts["row groups"] = " ".join(f"{group.num_rows}:{group.column(0).compression}" for group in groups)
    for key, value in (table.schema.metadata or {}).items():
        with contextlib.suppress(ValueError):  # no JSON
            parts |= leaves({f"metadata {key.decode()}": json.loads(value)}, folder)
    return parts | {f"column {name}": digest(repr(table.column(name).to_pylist())) for name in table.column_names}


def without_ids(text: str, folder: Path) -> str:
    """Replace the folder, ids and digests."""
    return re.sub(r"[0-9a-f]{32,}", "*", text.replace(str(folder), "WORLD"))


def leaves(value: object, folder: Path, name: str = "") -> Iterator[tuple[str, str]]:
    """Yield the values of nested mappings and lists as JSON, each with its path."""
    if isinstance(value, dict) and value:
        for key, each in value.items():
            if key not in VOLATILE:
                yield from leaves(each, folder, f"{name}.{key}" if name else str(key))
    elif isinstance(value, list) and any(isinstance(each, dict | list) for each in value):
        for number, each in enumerate(value):
            yield from leaves(each, folder, f"{name}[{number}]")
    else:
        yield name, without_ids(json.dumps(value), folder)


def settings(folder: Path) -> dict[str, Entries]:
    """Resolve every configuration; print those that are refused, and why."""
    from trainer.config import load_config
    from trainer.errors import ConfigError

    found = Entries()
    for line in CONFIGURATIONS:
        try:
            values = load_config(settings=line.split("; ") if line else []).model_dump(mode="json")
            found[line or "default"] = dict(sorted(leaves(values, folder)))
        except ConfigError as error:
            print(f"settings: refused: {line}: {error}", file=sys.stderr)
    return {"settings": found}


def environment() -> dict[str, str]:
    """Return the commit, and what bits depend on."""
    import torch

    git = ["git", "-C", str(ROOT), "describe", "--always", "--dirty", "--abbrev=12"]
    model = re.search(r"model name\s*: (.*)", Path("/proc/cpuinfo").read_text())
    return {
        "commit": subprocess.run(git, capture_output=True, text=True, check=False).stdout.strip(),
        "processor": f"{model[1] if model else platform.machine()}, {torch.backends.cpu.get_cpu_capability()}",
        "python": platform.python_version(),
        **{name: version(name) for name in ("torch", "torchvision", "numpy", "pyarrow", "pillow")},
        "launcher": TWO_RANKS.partition(" ")[0],
    }


def computed() -> dict[str, Any]:
    """Compute a whole record."""
    os.sched_setaffinity(0, {max(os.sched_getaffinity(0))})  # an extraction has as many threads as cores
    result: dict[str, Any] = {"header": environment()}
    for section in (settings, scenarios, world):
        with tempfile.TemporaryDirectory(prefix="reference-") as name:
            folder = Path(name).resolve()
            for package in ("jobs", "tests"):
                (folder / package).symlink_to(ROOT / package)
            result |= section(folder)
    return result


class Change(NamedTuple):
    """A difference between two records; `key` is None if a whole entry is gone or new."""

    section: str
    entry: str
    key: str | None
    old: str | None
    new: str | None

    @property
    def state(self) -> str:
        """Whether it is gone, new or changed."""
        return "gone" if self.new is None else "new" if self.old is None else "changed"

    @property
    def counts(self) -> bool:
        """Whether it is a difference: deleted features may take scenarios and settings along."""
        is_free = self.section in MAY_GO if self.key is None else self.section == "settings"
        return self.state == "changed" or not is_free


def changes(old: dict[str, Any], new: dict[str, Any]) -> Iterator[Change]:
    """Yield all that differs between two records, their headers aside."""
    for section in [name for name in dict.fromkeys([*old, *new]) if name != "header"]:
        before, after = old.get(section, {}), new.get(section, {})
        for entry in dict.fromkeys([*before, *after]):
            if entry not in after:
                yield Change(section, entry, None, "there", None)
            elif entry not in before:
                yield Change(section, entry, None, None, "there")
            else:
                was, now = before[entry], after[entry]
                for key in dict.fromkeys([*was, *now]):
                    if was.get(key) != now.get(key):
                        yield Change(section, entry, key, was.get(key), now.get(key))


def lines_of(found: Iterable[Change]) -> Iterator[str]:
    """Write a line for each entry, of settings for each setting: its first values, and the names of others."""
    groups = defaultdict[tuple[str, str, str], list[Change]](list)
    for each in found:
        by_key = each.section == "settings" and each.key is not None
        groups[each.section, each.state, str(each.key if by_key else each.entry)].append(each)
    for (section, state, name), members in groups.items():
        first, *others = [each.entry if section == "settings" else str(each.key) for each in members]
        if members[0].key is None:
            yield f"{section}: {state}: {name}"
            continue
        others = [name for name in others if not name.startswith("loss ")]  # they follow from the first one
        more = [*others[:MOST_KEYS], *([f"{len(others) - MOST_KEYS} more"] if len(others) > MOST_KEYS else [])]
        yield f"{section}: {state}: {name}: {', '.join([f'{first} ({both(members[0])})', *more])}"


def both(change: Change) -> str:
    """Write the old and the new value, losses in decimals, long ones from a little before they differ."""
    texts = ["nothing" if value is None else value for value in (change.old, change.new)]
    if all(re.fullmatch(r"-?0x\d\.[0-9a-f]+p[+-]\d+", text) for text in texts):
        texts = [repr(float.fromhex(text)) for text in texts]
    equal = next((n for n, pair in enumerate(zip(*texts, strict=False)) if len({*pair}) > 1), 0)
    start = max(0, equal - MOST_CHARACTERS // 2)
    cut = [f"...{text[start:]}" if start else text for text in texts]
    return " -> ".join(text if len(text) <= MOST_CHARACTERS else f"{text[:MOST_CHARACTERS]}..." for text in cut)


@app.command()
def record(file: Annotated[Path, typer.Argument(help="JSON file to write.")]) -> None:
    """Compute all sections, and write them to a file."""
    result = computed()
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(result, indent=0))
    counts = ", ".join(f"{len(entries)} {name}" for name, entries in result.items() if name != "header")
    print(f"written to {file}: {counts}; commit {result['header']['commit']}")


@app.command()
def compare(
    file: Annotated[Path, typer.Argument(help="An earlier record.")],
    other: Annotated[Path | None, typer.Argument(help="Another record; without it, this commit's is computed.")] = None,
) -> None:
    """Print by name what differs from an earlier record; exit 1 where something does."""
    old = json.loads(file.read_text())
    new = json.loads(other.read_text()) if other else computed()
    commits = [each["header"].pop("commit") for each in (old, new)]
    for name in dict.fromkeys([*old["header"], *new["header"]]):
        was, now = (each["header"].get(name) for each in (old, new))
        if was != now:
            print(f"warning: {name} was {was} and is {now}; that alone may change bits")
    found = list(changes(old, new))
    print(*(f"{line}\n" for line in lines_of(found)), sep="", end="")
    differences = sum(each.counts for each in found)
    print(f"{differences or 'no'} differences between {commits[0]} and {commits[1]}")
    raise typer.Exit(1 if differences else 0)


if __name__ == "__main__":
    app()
