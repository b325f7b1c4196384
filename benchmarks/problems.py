"""The problems that benchmarks tell of, each with its sentence."""

from featurestore.errors import Sentences


class Problem(Sentences):
    """What can be wrong, in the order of the names."""

    BAD_IMAGES = "only good images can be timed: {reasons}"
    DIFFERENT_LOSSES = "{where} and {other} do not train the same model: their first losses are {losses} and {first}, {worst:.2g} apart where {allowed} is allowed; no figure is reported"
    ENDED = "{where} ended with {value}:\n{log}"
    FOLDER_UNUSABLE = "--dir {where} cannot be used: {reason}; choose another"
    JSON_NOT_WRITTEN = "cannot write --json {where}: {reason}"
    NOT_A_WORKLOAD = "{where} is not empty and holds no workload; choose another folder, or empty it"
    NOT_FOR_FUXICTR = "the schema has {value}; FuxiCTR's sequence models compare IDs of behaviours and ads"
    NOT_NAMED_SAMPLES = "{value!r} is not NAME=SAMPLES or NAME=SAMPLES:STORE, as ml=data/ml/samples"
    NO_FUXICTR = "{where}: FuxiCTR is not installed in this environment (make bench installs it)"
    NO_GAUC = "{where} has no GAUC, which the tables compare: no user of its test samples has impressions with and without a click; test on more of them (data.test_days, or test/ in data.samples)"
    NO_GPU = "no GPU found: PyTorch sees none on this machine; --device cpu measures the CPU in the same way"
    NO_SUCH_NAME = "{value}: choose among {known}"
    NO_SUCH_TABLE = "--table {value}: {where} has {known}"
    NO_SUCH_VARIANT = "{where}: tables.{table} has no variant {value!r} to compare with"
    OTHER_HISTORIES = "{where} was not made here: its histories are not of {wanted} days; remove it"
    SERVER_SILENT = "a server did not answer at {where}:\n{log}"
    TOO_FEW_DAYS = "{where} has {value} days; days for training, validation and judging need more of them"
    TOO_FEW_TO_TUNE = "{where} has {value} training days, and tuning needs 2; leave it out: --no-tune"
    TOO_FEW_TO_WARM_UP = "data.samples={where} has {value} days of samples; warm-up from the day before needs {least} at least, in files that begin with day=2026-01-31 (jobs/build_samples.py writes them)"
