"""What the explorer needs besides the packages of training and serving, which machines that only do these lack."""

from importlib.util import find_spec

from explorer.errors import ExplorerError

NEEDED = ("httpx2", "plotly", "python_multipart", "sklearn", "umap")


def check_installed() -> None:
    """Raise ExplorerError where a package is missing."""
    if missing := [name for name in NEEDED if find_spec(name) is None]:
        raise ExplorerError(
            f"the explorer needs packages that are not installed here ({', '.join(missing)}): "
            "pip install 'crossmedia[explorer]', or make install in the repository"
        )
