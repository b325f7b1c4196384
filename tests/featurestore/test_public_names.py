"""The package shows exactly the promised names, and importing it is quick and silent."""

import inspect
import pickle
import subprocess
import sys

import pytest

import featurestore
from featurestore import errors

PROMISED = {
    "Codec",
    "ExtractorSpec",
    "FeatureClient",
    "FeaturePartition",
    "FeatureRows",
    "FeatureStatistics",
    "FeatureStore",
    "Lookup",
    "QuarantineRow",
    "Snapshot",
    "StoreInfo",
    "connect",
    "key_of_uri",
    "keys_of_uris",
    "owner_of",
    "shard_of",
    "to_bits",
    "to_float32",
}
ERRORS = [value for _, value in inspect.getmembers(errors, inspect.isclass) if value.__module__ == errors.__name__]


def test_the_public_names_are_exactly_the_promised_ones() -> None:
    assert set(featurestore.__all__) == PROMISED
    assert all(hasattr(featurestore, name) for name in PROMISED)


@pytest.mark.parametrize("error", ERRORS)
def test_every_error_has_one_root_stands_in_the_tree_and_pickles(error: type[Exception]) -> None:
    assert issubclass(error, errors.UserError)
    assert error.__name__ in (errors.__doc__ or "")
    copy = pickle.loads(pickle.dumps(error("a message")))
    assert type(copy) is error and str(copy) == "a message"


def test_importing_the_package_and_its_commands_loads_neither_faiss_nor_torch_and_says_nothing() -> None:
    script = "import sys, featurestore.__main__; sys.exit(bool({'faiss', 'pyarrow', 'torch'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (0, b"", b"")
