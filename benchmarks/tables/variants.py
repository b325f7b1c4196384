"""The file of a call: tables by name, and the variants of each."""

from collections.abc import Collection
from pathlib import Path
from typing import Any, Literal

from pydantic import Field

from benchmarks.problems import Problem
from trainer.config import Section, read_mapping, validated
from trainer.errors import ConfigError


class Variant(Section):
    """One row: what its runs have over those of the table, and what the paper measured, if it did."""

    settings: dict[str, Any] = Field(default_factory=dict)
    config: str | None = None
    """YAML file that is laid below `settings`."""
    days: Literal["all", "previous", "current"] = "all"
    """Of samples with days: all but the last one, tested on the one before it; or all but the first one."""
    warm_start: "Variant | None" = None
    """What the run begins with: a run of the same seed that is not in the table."""
    against: str | None = None
    """The variant that it is compared with, where that is not the first one."""
    paper_gauc: float | None = None


class Table(Section):
    """Variants that are compared with the first of them, and the settings that they share."""

    title: str
    settings: dict[str, Any] = Field(default_factory=dict)
    variants: dict[str, Variant]

    def baseline_of(self, name: str) -> str:
        """Name the variant that `name` is compared with."""
        return self.variants[name].against or next(iter(self.variants))


class _Tables(Section):
    tables: dict[str, Table]


def load_tables(file: Path, names: Collection[str] = ()) -> dict[str, Table]:
    """Load the tables of a file, or those of these names. Raises ConfigError."""
    tables = validated(_Tables, read_mapping(file, "", ConfigError), str(file), ConfigError).tables
    for name, table in tables.items():
        known = table.variants
        if unknown := [each.against for each in known.values() if each.against and each.against not in known]:
            raise ConfigError(Problem.NO_SUCH_VARIANT, file, name, unknown[0])
    if unknown := [name for name in names if name not in tables]:
        raise ConfigError(Problem.NO_SUCH_TABLE, unknown[0], file, ", ".join(tables))
    return {name: table for name, table in tables.items() if not names or name in names}
