"""A module of a net that rank 1 cannot import, as a package that one of two hosts lacks."""

import os

if os.environ.get("HOROVOD_RANK") == "1":
    import no_such_package  # type: ignore[import-not-found]  # noqa: F401


from trainer.models.ctr import Dicm as MyNet

__all__ = ["MyNet"]
