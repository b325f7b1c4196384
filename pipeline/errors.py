"""The tree of errors that the pipeline raises; all of them survive pickling between Dask workers and the client."""

from featurestore.errors import UsageError, UserError


class PipelineError(UserError):
    """Root of the pipeline's errors; its text is one message for the user who started the job."""


class SourceError(PipelineError):
    """The images cannot be listed: a table without the columns needed, a file that cannot be read."""


class SourceNotFoundError(SourceError, UsageError):
    """There is no such folder or table of images, or no image in it."""


class BadImageError(PipelineError):
    """One image cannot be read or decoded: `str(error)` is the reason that goes into quarantine, the run continues."""


class BackboneError(PipelineError, UsageError):
    """There is no such network or layer, or it gives more than one vector per image."""


class WeightsError(PipelineError, UsageError):
    """The network's weights cannot be had or do not fit the network."""


class StoreRunError(PipelineError):
    """A job that writes a store failed as a whole."""


class VectorImportError(PipelineError):
    """Imported vectors are not of the promised kind, or cannot be imported."""


class VectorsNotFoundError(VectorImportError, UsageError):
    """There is no such file or folder, or no vectors in it."""


class DemoError(PipelineError):
    """Demo data cannot be made from these arguments."""


class ClusterError(PipelineError):
    """There is no usable Dask cluster: too few workers, no certificates, packages missing."""


class SchedulerUnreachableError(ClusterError):
    """No scheduler answers at the address."""


class InsecureSchedulerError(ClusterError, UsageError):
    """A scheduler is beyond loopback and without TLS."""


class SampleError(PipelineError):
    """The logs cannot be made into sample groups."""


class SampleOptionError(SampleError, UsageError):
    """An option makes no sense, would destroy something, or names a missing place."""
