"""Sample groups against a slow reference that goes row by row."""

import dataclasses
import random
from datetime import UTC, datetime
from typing import Any

import numpy as np
import pytest

from pipeline.options import SampleOptions
from pipeline.samples import logs as pieces_module
from pipeline.samples.build import build_samples
from tests.pipeline.samples.rows import DAY_S, Row, in_pieces, random_logs, read, write

SEEDS = (0, 1, 3, 5, 9, 10, 14, 15)
"""They draw each number of partitions and of behaviours at least twice, and each window four times."""

# The reference


def reference(impressions: list[Row], behaviors: list[Row], options: SampleOptions) -> list[Row]:
    """Groups by the words of the documentation, one row at a time, of good rows."""
    clicks: dict[tuple[Any, ...], Row] = {}
    for row in impressions:
        same = tuple(row[name] for name in ("user", "session", "timestamp", "scene", "item", "image", "category"))
        kept = clicks.setdefault(same, dict(row))
        kept["label"] = max(kept["label"], row["label"])
    groups: list[list[Row]] = []
    for row in [clicks[same] for same in sorted(clicks)]:
        last = groups[-1][-1] if groups else None
        is_same = last is not None and (last["user"], last["session"]) == (row["user"], row["session"])
        if is_same:
            other_day = last["timestamp"] // DAY_S != row["timestamp"] // DAY_S
            is_same = not (other_day and row["timestamp"] - last["timestamp"] > options.midnight_pause_s)
        if is_same:
            groups[-1].append(row)
        else:
            groups.append([row])
    return sorted((sample(group, behaviors, options) for group in groups), key=sort_key)


def sort_key(row: Row) -> tuple[int, int, int]:
    return row["timestamp"], row["user"], row["session"]


def sample(group: list[Row], behaviors: list[Row], options: SampleOptions) -> Row:
    first = group[0]
    low, high = first["timestamp"] - options.window_days * DAY_S, first["timestamp"]
    history = {
        (row["timestamp"], row["item"], row["image"], row["category"])
        for row in behaviors
        if row["user"] == first["user"] and low <= row["timestamp"] < high and row["dwell_s"] >= options.min_dwell_s
    }
    newest = sorted(history, reverse=True)[: options.max_behaviors]
    return {
        "user": first["user"],
        "session": first["session"],
        "timestamp": int(first["timestamp"]),
        "day": datetime.fromtimestamp(first["timestamp"], UTC).strftime("%Y-%m-%d"),
        "user_age": first["user_age"],
        "behavior_item": [row[1] for row in newest],
        "behavior_image": [row[2] for row in newest],
        "behavior_category": [row[3] for row in newest],
        "ad_item": [row["item"] for row in group],
        "ad_image": [row["image"] for row in group],
        "ad_category": [row["category"] for row in group],
        "ad_scene": [row["scene"] for row in group],
        "label": [row["label"] for row in group],
    }


@pytest.mark.parametrize("seed", SEEDS)
def test_groups_are_those_of_the_reference(seed, options, client, tmp_path, monkeypatch):
    monkeypatch.setattr(pieces_module, "PIECE_ROWS", 20)  # several tasks per file
    rng = random.Random(seed)
    impressions, behaviors = random_logs(rng)
    write(tmp_path / "logs", in_pieces(rng, impressions), in_pieces(rng, behaviors))
    options = dataclasses.replace(
        options, partitions=rng.choice([1, 3, 8]), max_behaviors=rng.choice([1, 3, 50]), window_days=rng.choice([1, 14])
    )
    summary = build_samples(options, client)
    rows = read(options.samples, "train")
    expected = reference(impressions, behaviors, options)
    assert rows == expected  # and so in this order
    check_counts(summary, impressions, behaviors, expected)


def check_counts(summary: dict[str, Any], impressions: list[Row], behaviors: list[Row], groups: list[Row]) -> None:
    log = summary["impressions"]
    assert log["rows"] == len(impressions)
    assert log["kept"] == sum(len(row["label"]) for row in groups) == summary["train"]["impressions"]
    assert log["kept"] + log["duplicates"] == log["rows"]
    log = summary["behaviors"]
    assert log["rows"] == len(behaviors) == sum(log[name] for name in ("used", "unused", "short_dwell", "duplicates"))
    assert log["short_dwell"] == sum(row["dwell_s"] < 5 for row in behaviors)
    assert summary["users"] == len({row["user"] for row in impressions})
    assert summary["groups"] == len(groups)
    assert summary["groups_without_behaviors"] == sum(not row["behavior_item"] for row in groups)
    assert summary["behaviors_in_groups"] == sum(len(row["behavior_item"]) for row in groups)
    labels = [label for row in groups for label in row["label"]]
    assert summary["train"]["positive_rate"] == pytest.approx(np.mean(labels))
