"""The problems that crossmedia tells of, each with its sentence."""

from featurestore.errors import Sentences


class Problem(Sentences):
    """What can be wrong, in the order of the names."""

    ENDED = "{where} ended with exit code {value}"
    REFUSED = "the scorer answered {value}: {reason}"
    TOO_SLOW = "{where} after {limit_s:g} seconds"
