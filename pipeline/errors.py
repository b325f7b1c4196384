"""The tree of errors that the pipeline raises; all of them survive pickling between Dask workers and the client.

PipelineError
├── SourceError        the images cannot be listed: a table without the columns needed, a file that cannot be read
│   └── SourceNotFoundError         no such folder or table, or no image in it
├── BadImageError      one image cannot be read or decoded; it is quarantined, the run goes on
├── BackboneError      no such network or layer, or one that gives more than a vector per image
├── WeightsError       the network's weights cannot be had or do not fit
├── ExtractionError    the extraction as a whole failed
├── VectorImportError  vectors are not what they are said to be, or cannot be imported
│   └── VectorsNotFoundError        no such file or folder, or no vectors in it
├── ClusterError       no usable Dask cluster
│   ├── SchedulerUnreachableError   nobody answers at the address
│   ├── MissingCertificatesError    tls:// and no certificates in Dask's configuration
│   ├── InsecureSchedulerError      beyond loopback and without TLS
│   ├── MissingWorkersError         too few workers in the time
│   ├── VersionMismatchError        client, scheduler and workers differ
│   └── MissingPackagesError        workers that cannot import this project
└── SampleError        the logs cannot be made into samples
    └── SampleOptionError           an option makes no sense, or names what is not there
"""

from collections.abc import Mapping, Sequence

from featurestore.errors import USAGE, UserError

SCHEDULER_LOST = "the Dask scheduler was lost or restarted; run the same command again to go on"


class PipelineError(UserError):
    """Root of the pipeline's errors; its text is one message for the person who started the job."""


class SourceError(PipelineError):
    """The images cannot be listed."""


class SourceNotFoundError(SourceError):
    """There is no such folder or table of images, or no image in it."""

    exit_code = USAGE


class BadImageError(PipelineError):
    """One image cannot be read or decoded; `str(error)` is the reason that goes into quarantine."""


class BackboneError(PipelineError):
    """There is no such network or layer, or it gives more than one vector per image."""

    exit_code = USAGE


class WeightsError(PipelineError):
    """The network's weights cannot be had or do not fit the network."""

    exit_code = USAGE


class ExtractionError(PipelineError):
    """The extraction as a whole failed."""


class VectorImportError(PipelineError):
    """Vectors from elsewhere are not what they are said to be, or cannot be imported."""


class VectorsNotFoundError(VectorImportError):
    """There is no such file or folder, or no vectors in it."""

    exit_code = USAGE


class ClusterError(PipelineError):
    """There is no usable Dask cluster."""


class SchedulerUnreachableError(ClusterError):
    """No scheduler answers at the address."""

    def __init__(self, address: str, reason: str):
        super().__init__(address, reason)
        self.address, self.reason = address, reason

    def __str__(self) -> str:
        return (
            f"no Dask scheduler answers at {self.address} ({self.reason}); check the address and that "
            "`dask scheduler` runs there, or unset DASK_SCHEDULER_ADDRESS and DASK_SCHEDULER_FILE to work on a local "
            "cluster"
        )


class MissingCertificatesError(ClusterError):
    """The scheduler's address is tls:// and Dask's configuration has no certificates."""

    def __init__(self, address: str):
        super().__init__(address)
        self.address = address

    def __str__(self) -> str:
        return (
            f"the scheduler {self.address} needs TLS certificates, and Dask's configuration has none: set "
            "DASK_DISTRIBUTED__COMM__TLS__CA_FILE, DASK_DISTRIBUTED__COMM__TLS__CLIENT__CERT and "
            "DASK_DISTRIBUTED__COMM__TLS__CLIENT__KEY to the .pem files of that cluster"
        )


class InsecureSchedulerError(ClusterError):
    """A scheduler beyond loopback without TLS."""

    exit_code = USAGE

    def __init__(self, address: str):
        super().__init__(address)
        self.address = address

    def __str__(self) -> str:
        return (
            f"the scheduler {self.address} is beyond loopback and without TLS: Dask sends pickles, so whoever "
            "reaches that port can run code on every worker. Use tls:// with certificates in Dask's configuration "
            "(distributed.comm.tls), or on a network that you trust pass --insecure to dask-submit, or set "
            "DASK_CROSSMEDIA__INSECURE_SCHEDULER=True for jobs that you run without it"
        )


class MissingWorkersError(ClusterError):
    """Fewer workers than asked for within the time."""

    def __init__(self, address: str, wanted: int, found: int, timeout_s: float):
        super().__init__(address, wanted, found, timeout_s)
        self.address, self.wanted, self.found, self.timeout_s = address, wanted, found, timeout_s

    def __str__(self) -> str:
        return (
            f"{self.found} of {self.wanted} workers are at {self.address} after {self.timeout_s:g} s; "
            f"start more with `dask worker {self.address}`, or lower --wait-workers, or raise --timeout"
        )


class VersionMismatchError(ClusterError):
    """Client, scheduler and workers run versions that do not work together."""

    def __init__(self, differences: Sequence[str]):
        super().__init__(differences)
        self.differences = list(differences)

    def __str__(self) -> str:
        differences = "; ".join(self.differences)
        return f"versions on the cluster differ from those here: {differences}. Install the same ones on every machine"


class MissingPackagesError(ClusterError):
    """Workers that cannot import this project."""

    def __init__(self, failures: Mapping[str, str]):
        super().__init__(failures)
        self.failures = dict(failures)

    def __str__(self) -> str:
        shown = "; ".join(f"{worker}: {reason}" for worker, reason in list(self.failures.items())[:3])
        return (
            f"{len(self.failures)} workers cannot import this project ({shown}). Install it on every worker's "
            "machine, in the environment that runs `dask worker`: `pip install .` in the project's folder"
        )


class SampleError(PipelineError):
    """The logs cannot be made into sample groups."""


class SampleOptionError(SampleError):
    """An option makes no sense, would destroy something, or names what is not there."""

    exit_code = USAGE
