"""The tree of errors that the pipeline raises; all of them survive pickling between Dask workers and the client.

PipelineError
├── SourceError        the images cannot be listed: no such folder, nothing in it, a table without the columns needed
├── BadImageError      one image cannot be read or decoded; it is quarantined, the run goes on
├── WeightsError       the network's weights cannot be had or do not fit
├── ExtractionError    the extraction as a whole failed
├── ClusterError       no usable Dask cluster
└── SampleError        the logs cannot be made into samples
"""


class PipelineError(Exception):
    """Root of the pipeline's errors; its text is one message for the person who started the job."""


class SourceError(PipelineError):
    """The images cannot be listed."""


class BadImageError(PipelineError):
    """One image cannot be read or decoded; `str(error)` is the reason that goes into quarantine."""


class WeightsError(PipelineError):
    """The network's weights cannot be had or do not fit the network."""


class ExtractionError(PipelineError):
    """The extraction as a whole failed."""


class ClusterError(PipelineError):
    """There is no usable Dask cluster."""


class SampleError(PipelineError):
    """The logs cannot be made into sample groups."""
