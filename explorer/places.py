"""The addresses that the explorer shows: a store, runs, samples, images and a model; each may be missing."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import typer

from explorer.errors import ExplorerError
from explorer.problems import Problem
from featurestore.console.commandline import on_this_machine
from featurestore.errors import UserError
from featurestore.published.paths import RunPath, run_path
from serving.settings import AccessSettings


@dataclass(frozen=True, kw_only=True)
class Places:
    """Addresses as given by the user. A part without an address has no pages."""

    store: Annotated[str | None, typer.Option(help="Feature store: a folder or s3:// address.")] = None
    runs: Annotated[str | None, typer.Option(help="Folder or address that holds runs.")] = None
    samples: Annotated[str | None, typer.Option(help="Samples; by default each run's own.")] = None
    images: Annotated[str | None, typer.Option(help="Pictures: the folder or address that the store was made of.")] = (
        None
    )
    model: Annotated[str | None, typer.Option(help="Published model: a folder or s3:// address.")] = None
    nets: Annotated[
        str | None,
        typer.Option(
            metavar="PACKAGE",
            help="Package whose classes runs may use as model.base. A page that opens such a run imports it.",
            show_default="none is imported",
        ),
    ] = None

    def check(self) -> None:
        """Check that the places exist, before a server listens. Raises ExplorerError, FeatureStoreError."""
        if not any((self.store, self.runs, self.samples, self.images, self.model)):
            raise ExplorerError(Problem.NOTHING_GIVEN)
        if self.store is not None:
            from featurestore.store import FeatureStore

            FeatureStore.open(self.store)
        if self.runs is not None and not run_path(self.runs).is_dir():
            raise ExplorerError(Problem.NO_FOLDER, "--runs", self.runs, "runs are made by crossmedia train")
        if self.samples is not None and not run_path(self.samples).is_dir():
            raise ExplorerError(Problem.NO_FOLDER, "--samples", self.samples, "name the folder of your samples")
        if self.images is not None:
            self._check_images(self.images)
        if self.model is not None:
            from featurestore.storage.storage import Storage
            from serving.bundle.log import read_version

            read_version(Storage(self.model))

    def _check_images(self, images: str) -> None:
        """Raise ExplorerError, StorageError."""
        if "://" not in images:
            if not Path(images).is_dir():
                raise ExplorerError(Problem.NO_FOLDER, "--images", images, "name the folder of your images")
            return
        from featurestore.storage.storage import Storage

        Storage(images).check_bucket()

    def check_net(self, base: str) -> None:
        """Raise ExplorerError if a run's model.base would import code that the user has not allowed."""
        if "." in base and not (self.nets and base.startswith(f"{self.nets}.")):
            package = base.partition(".")[0]
            raise ExplorerError(Problem.OWN_NET, base, package)

    def store_for(self, of_run: str) -> str | None:
        """Choose the store of a run: None for its own, if it can be opened or no other is given, else the shown one."""
        from featurestore.store import FeatureStore

        if self.store is None:
            return None
        try:
            FeatureStore.open(of_run)
        except (UserError, OSError):
            return self.store
        return None

    def run(self, name: str) -> RunPath:
        """Return the folder of a run by its name, or NAME/DAY of trainer.daily. Raises ExplorerError for a path."""
        parts = name.split("/")
        if self.runs is None or len(parts) > 2 or any(part in ("", ".", "..") for part in parts):
            raise ExplorerError(Problem.NO_RUN, name[:60])
        folder = run_path(self.runs)
        for part in parts:
            folder = folder / part
        return folder


@dataclass(frozen=True, kw_only=True)
class ExplorerSettings(AccessSettings, Places):
    """The options of `crossmedia explore`."""

    port: Annotated[int, typer.Option(min=0, max=65535, help="Port to listen on; 0 takes a free one.")] = 8090
    token_file: Annotated[
        Path | None, typer.Option(help="File with one token per line; visitors enter one of them first.")
    ] = None
    read_timeout_s: float = 30.0
    drain_s: int = 5


@dataclass(frozen=True, kw_only=True)
class ExportSettings(Places):
    """The options of `crossmedia explore export`."""

    out: Annotated[
        Path, typer.Argument(metavar="OUT", help="Folder to write; open OUT/index.html.", callback=on_this_machine)
    ]
    most_files: Annotated[
        int, typer.Option(min=10, help="Most pages and pictures; further links lead to a page that says so.")
    ] = 2000
