"""A store on S3 from processes that know nothing but the usual environment variables: written, looked at, served."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from featurestore import FeaturePartition, FeatureStore, StoreInfo, to_float32

WRITER = """
import sys
import numpy as np
from featurestore import FeatureRows, FeatureStore, StoreInfo
store = FeatureStore.create(sys.argv[1], StoreInfo.model_validate_json(sys.argv[2]))
rows = FeatureRows.of([f"{i}.jpg" for i in range(100)], np.arange(800, dtype=np.uint16).reshape(100, 8))
store.put(rows)
store.delete(rows.keys_N[:10])
"""
READER = """
import json, sys
import numpy as np
from featurestore import FeaturePartition, keys_of_uris
keys = keys_of_uris([f"{i}.jpg" for i in range(10, 100)])
found = {}
for rank in range(2):
    with FeaturePartition.load(sys.argv[1], rank, 2, cache_dir=sys.argv[2]) as partition:
        owned = keys[partition.owns(keys)]
        found |= dict(zip(owned.tolist(), partition.lookup(owned).features_UD.tolist()))
print(json.dumps([found[key] for key in keys.tolist()]))
"""


@pytest.fixture
def run(s3_endpoint: str):
    """A process with AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY, AWS_ENDPOINT_URL and no other setting of AWS."""
    wanted = ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_ENDPOINT_URL")
    environment = {name: value for name, value in os.environ.items() if not name.startswith("AWS_") or name in wanted}
    assert all(environment[name] for name in wanted)

    def run(*arguments: object) -> str:
        command = [sys.executable, *map(str, arguments)]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
        assert (done.returncode, done.stderr) == (0, "")
        return done.stdout

    return run


def test_a_store_on_s3_by_the_environment_alone(run, s3_url: str, info: StoreInfo, tmp_path: Path) -> None:
    url = f"{s3_url}/deep/features"
    run("-c", WRITER, url, info.model_dump_json())
    expected = np.arange(800).reshape(100, 8)[10:]
    assert json.loads(run("-c", READER, url, tmp_path / "cache")) == expected.tolist()
    shown = run("-m", "featurestore", "get", url, "--uri", "99.jpg").split(": ")[1].split()
    assert np.allclose([float(value) for value in shown], to_float32(expected[-1].astype(np.uint16), "bfloat16"))


def test_a_cache_that_was_made_from_s3_needs_none_of_its_data_files_again(
    s3_url: str, info: StoreInfo, make_rows, tmp_path: Path
) -> None:
    store = FeatureStore.create(f"{s3_url}/features", info)
    rows = make_rows(50, info)
    store.put(rows)
    with FeaturePartition.load(store.url, cache_dir=tmp_path) as partition:
        first = partition.lookup(rows.keys_N).features_UD
    store.storage.delete("data")
    with FeaturePartition.load(store.url, cache_dir=tmp_path) as partition:
        assert np.array_equal(partition.lookup(rows.keys_N).features_UD, first)
    assert np.array_equal(first, rows.features_ND)
