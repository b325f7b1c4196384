"""Which rows of a log are wanted."""

from pathlib import Path

import numpy as np
import pytest

from pipeline.samples.logs import WantedRows


@pytest.mark.parametrize("ids", ["near zero", "of all 64 bits", "with the same last bits"])
def test_rows_of_some_users_are_found_exactly(tmp_path: Path, ids: str) -> None:
    random = np.random.default_rng(3)
    low, high, step = {
        "near zero": (-500, 500, 1),
        "of all 64 bits": (-(2**63), 2**63 - 1, 1),
        "with the same last bits": (-400, 400, 2**40),
    }[ids]
    known_U = np.unique(random.integers(low, high, 300)) * step
    users_U, user_N = known_U[::3], random.choice(known_U, 5_000)
    time_N = random.integers(0, 100, len(user_N))
    np.save(tmp_path / "users.npy", users_U)
    wanted_N = WantedRows(20, 60, str(tmp_path / "users.npy")).of(time_N, user_N)
    assert (wanted_N == (time_N >= 20) & (time_N < 60) & np.isin(user_N, users_U)).all()
    assert 500 < wanted_N.sum() < 4_000


def test_no_users_no_rows(tmp_path: Path) -> None:
    np.save(tmp_path / "users.npy", np.empty(0, np.int64))
    wanted = WantedRows(0, 10, str(tmp_path / "users.npy"))
    assert wanted.of(np.arange(4), np.arange(4)).tolist() == [False] * 4
