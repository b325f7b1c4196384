"""Commands info, log and use: show a version's contents, list the versions, and choose the version to serve."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.filesize import decimal as bytes_text

from featurestore.console.commandline import CommandApp
from featurestore.console.files import JsonOption, write_json_option
from featurestore.console.output import figure, print_rows, print_summary, progress_bar
from featurestore.errors import FAILED

if TYPE_CHECKING:
    from featurestore.storage.storage import Storage
    from serving.bundle.manifest import BundleManifest, VectorsOf

app = CommandApp()

_MISSING = {
    "zeros": "count as zeros",
    "learned": "count as the vector that training has learned for them",
    "error": "count as zeros; training has met none, as it would have stopped",
}
"""Texts for the policies for images without a feature."""

Url = Annotated[str, typer.Argument(metavar="MODEL", help="Folder or s3:// address of the published model.")]


@app.command(
    epilog="Examples:\n\n- `python -m serving info data/models/ctr`\n\n"
    "- `python -m serving info s3://shop/models/ctr --version 3`"
)
def info(
    url: Url,
    version: Annotated[int | None, typer.Option("--version", min=1, help="By default the one in use.")] = None,
    json_file: JsonOption = None,
) -> None:
    """Show the contents of a version: its run, its ID rows, and the snapshots of its vectors.

    Exit code 1 if one of its files is missing or has another size.
    """
    from featurestore.log import utc_text
    from featurestore.storage.storage import Storage
    from serving.bundle.log import read_version, version_in_use
    from serving.bundle.upkeep.verify import find_damage

    storage = Storage(url)
    manifest = read_version(storage, version)
    in_use = version_in_use(storage) == manifest.version
    damage = find_damage(storage, manifest)
    vectors = {of.store: _vectors_of(storage, manifest, of) for of in manifest.vectors}
    rows_bytes = sum(file.bytes for file in manifest.files if file.name in {each.name for each in manifest.rows})
    error = manifest.id_error
    lines = {
        "model": storage.url,
        "version": f"{manifest.version} ({'in use' if in_use else 'not in use'})",
        "published": f"{utc_text(manifest.time_s)} by {manifest.writer}",
        "run": f"{manifest.run}, {manifest.checkpoint} ({manifest.checkpoint_digest[:12]})",
        "files": f"{len(manifest.files)}, {sum(file.bytes for file in manifest.files):,} bytes",
        "id rows": f"{sum(each.num_rows for each in manifest.rows):,} as {manifest.id_dtype}, {rows_bytes:,} bytes",
        **({"error of id rows": f"worst {error.worst:.2g}, mean {error.mean:.2g} of a logit"} if error else {}),
        **{f"table {each.name}": f"{each.kind}, {each.num_rows:,} rows of {each.width}" for each in manifest.tables},
        **{f"vectors of {name}": _vectors_text(each) for name, each in vectors.items()},
        "missing images": _MISSING[manifest.missing_in_training],
        **{f"test {name.replace('_', ' ')}": figure(value) for name, value in manifest.metrics.items()},
    }
    width = max(24, *map(len, lines))
    for name, value in [*lines.items(), *(("damage", each) for each in damage)]:
        print_summary(f"{name:<{width}} {value}")
    values = {**manifest.model_dump(mode="json"), "in_use": in_use, "vectors_now": vectors, "damage": damage}
    write_json_option(json_file, values)
    if damage:
        raise typer.Exit(FAILED)


@app.command(epilog="Example: `python -m serving log data/models/ctr --last 20`")
def log(
    url: Url,
    last: Annotated[int | None, typer.Option("--last", "-n", min=1, help="How many to list; all by default.")] = None,
    json_file: JsonOption = None,
) -> None:
    """List the published versions, newest first, with the time when each was last put in use."""
    from featurestore.storage.storage import Storage
    from serving.bundle.log import choices, known_versions, read_version, version_in_use

    storage = Storage(url)
    known = known_versions(storage)
    if not known:
        read_version(storage)  # says what is wrong
    in_use, chosen = version_in_use(storage), choices(storage)
    found = {version: _readable(storage, version) for version in known[::-1][:last]}
    rows = [
        _log_row(version, manifest, version == in_use, [each.time_s for each in chosen if each.version == version])
        for version, manifest in found.items()
    ]
    print_rows(
        ("version", "published", "run", "checkpoint", "id rows", "bytes", "in use"), rows, numbers=("version", "bytes")
    )
    write_json_option(
        json_file,
        {
            "in_use": in_use,
            "versions": [manifest.model_dump(mode="json") for manifest in found.values() if manifest],
            "damaged": [version for version, manifest in found.items() if not manifest],
            "choices": [each.model_dump(mode="json") for each in chosen],
        },
    )


@app.command(epilog="Example: `python -m serving use data/models/ctr 3`")
def use(
    url: Url,
    version: Annotated[int, typer.Argument(metavar="VERSION", min=1, help="A published version.")],
    quick: Annotated[bool, typer.Option("--quick", help="Compare only the sizes of its files.")] = False,
) -> None:
    """Put a version in use, also an earlier one. Running scorers switch to it.

    Its files are first read and compared with their digests, and the version is opened as a scorer does. A version that
    is damaged or cannot be opened is refused, and the previous one stays in use."""
    from featurestore.storage.storage import Storage
    from serving.bundle.log import read_version, version_in_use
    from serving.bundle.log import use as use_version
    from serving.bundle.upkeep.verify import find_damage
    from serving.errors import BrokenBundleError

    storage = Storage(url)
    before = version_in_use(storage)
    stays = f"; version {before} stays in use" if before is not None else ""
    try:
        manifest = read_version(storage, version)
    except BrokenBundleError as error:
        raise BrokenBundleError(f"version {version} of {storage.url} is damaged{stays}: {error}") from error
    with progress_bar("files") as progress:
        damage = find_damage(storage, manifest, digests=not quick, progress=progress)
    if damage := damage or _problem_of_opening(storage.url, version):
        raise BrokenBundleError("\n".join([f"version {version} of {storage.url} is damaged{stays}:", *damage]))
    use_version(storage, version)
    instead = f" instead of version {before}" if before not in (None, version) else ""
    print_summary(f"version {version} of {storage.url} is in use{instead}")


def _problem_of_opening(url: str, version: int) -> list[str]:
    """Return in one line why a version with sound files cannot be opened, or an empty text. Raises StorageError."""
    from featurestore.errors import StorageError, UserError
    from featurestore.text import one_line
    from serving.bundle.open import Bundle
    from serving.scoring.scorer import Scorer

    try:
        bundle = Bundle.open(url, version, verify=False)
        try:
            Scorer(bundle)
        finally:
            bundle.close()
    except StorageError:
        raise
    except UserError as error:
        return [str(error)]
    except Exception as error:  # numpy and torch raise many kinds of errors for a forged manifest
        return [f"it cannot be opened: {type(error).__name__}: {one_line(error)}"]
    return []


def _vectors_of(storage: "Storage", manifest: "BundleManifest", of: "VectorsOf") -> dict[str, Any] | None:
    """Return the newest snapshot of a vectors store, and the snapshot of features that it matches; None if damaged."""
    from featurestore.errors import FeatureStoreError, StorageError
    from featurestore.store import FeatureStore

    try:
        snapshot = FeatureStore.open(storage.full(f"{manifest.folder}/{of.folder}")).snapshot()
        num_images = snapshot.num_rows
    except StorageError:
        raise
    except FeatureStoreError:
        return None
    mirrors = snapshot.manifest.mirrors
    return {
        "snapshot": snapshot.version,
        "images": num_images,
        "bytes": snapshot.manifest.file_bytes,
        "committed_s": snapshot.manifest.time_s,
        "mirrors": mirrors.model_dump() if mirrors else None,
    }


def _vectors_text(found: dict[str, Any] | None) -> str:
    if found is None:
        return "damaged"
    of = (
        f"of snapshot {found['mirrors']['version']} of {found['mirrors']['url']}"
        if found["mirrors"]
        else "of unknown features"
    )
    return f"snapshot {found['snapshot']}: {found['images']:,} images {of}, {found['bytes']:,} bytes"


def _readable(storage: "Storage", version: int) -> "BundleManifest | None":
    """Read the manifest of a version; None if it is damaged."""
    from serving.bundle.log import read_version
    from serving.errors import BrokenBundleError

    try:
        return read_version(storage, version)
    except BrokenBundleError:
        return None


def _log_row(version: int, manifest: "BundleManifest | None", in_use: bool, chosen_s: Sequence[float]) -> Sequence[str]:
    from featurestore.log import utc_text

    since = f"{'since' if in_use else 'was,'} {utc_text(chosen_s[-1])}" if chosen_s else ""
    if manifest is None:
        return f"{version}", "damaged", "", "", "", "", since
    return (
        f"{version}",
        utc_text(manifest.time_s),
        manifest.run,
        manifest.checkpoint,
        manifest.id_dtype,
        bytes_text(sum(file.bytes for file in manifest.files)),
        since,
    )
