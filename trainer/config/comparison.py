"""Differences between two records of runs: their settings, and the origins of their checkpoints.

A record is a mapping of sections (data, model, optim, ...) to values by name. That of a checkpoint's origin has not
only settings, but also the digest of the samples, the fields of the schema, and the kind of the stores' features.
"""

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

from featurestore.spec import differing
from trainer.config.config import Config
from trainer.config.options import SETTINGS_OF_POOLINGS, Decision, Section, decision_of

SAMPLES_DIGEST = "data.samples_digest"
_DECISIONS: dict[str, Decision] = {
    **{
        f"{section}.{name}": decision_of(field)
        for section, model in Config.model_fields.items()
        for name, field in model.annotation.model_fields.items()  # type: ignore[union-attr]
    },
    SAMPLES_DIGEST: "positions",
}
_OF_NETS = {
    "dcn": {"cross_layers", "cross_structure"},
    "two_tower": {"tower_width"},
}
_OF_ATTENTION = {"attention_hidden"}
"""Read by some poolings, and by the base din."""
_OF_POOLINGS = set[str]().union(*SETTINGS_OF_POOLINGS.values()) - _OF_ATTENTION
_OF_BEHAVIORS = _OF_POOLINGS | {"pooling", "image_products", "similarity_tiers", "similarity_top_k"}
OF_IMAGES = _OF_BEHAVIORS | {"shared_image_model", "visual_width", "embed_hidden", "id_proxy", "image_dropout"}
"""Settings that a model without images does not use."""


@dataclass(frozen=True)
class Difference:
    """A value that differs between two records: `here` in the first, `there` in the second; None if missing."""

    name: str
    """Section, setting and further names inside its value, joined by dots."""
    here: Any
    there: Any
    decides: Decision

    @property
    def setting(self) -> str:
        """The setting with its section."""
        return ".".join(self.name.split(".")[:2])

    def text(self, there: str) -> str:
        """Format both values; `there` names the second record."""
        return f"{self.name} is {self.here!r} here, {self.there!r} {there}"


def differences(
    here: Mapping[str, Any], there: Mapping[str, Any], accepted: Collection[Decision] = ()
) -> list[Difference]:
    """List the differences between two records, except those of the kinds `accepted`.

    A setting that is unused in both records, because of other settings of the model, counts as equal. Values that are
    not settings are of kind `parameters`, except the samples.
    """
    idle = {f"model.{name}" for name in _idle(here.get("model", {})) & _idle(there.get("model", {}))}
    found = [Difference(*each, decides_of(each[0])) for each in differing(here, there)]
    return [each for each in found if each.decides not in accepted and each.setting not in idle]


def decides_of(name: str) -> Decision:
    """Return the kind of a setting, or of another value of an origin, by its name."""
    return _DECISIONS.get(".".join(name.split(".")[:2]), "parameters")


def settings_that_decide(*kinds: Decision) -> dict[str, set[str]]:
    """List the settings of these kinds by section."""
    found: dict[str, set[str]] = {}
    for name, kind in _DECISIONS.items():
        if kind in kinds and name != SAMPLES_DIGEST:
            section, _, setting = name.partition(".")
            found.setdefault(section, set()).add(setting)
    return found


def values_that_decide(section: Section, *kinds: Decision) -> dict[str, Any]:
    """Return the values of a section's settings of these kinds."""
    return {
        name: value
        for name, value in section.model_dump().items()
        if decision_of(type(section).model_fields[name]) in kinds
    }


def _idle(model: Mapping[str, Any]) -> set[str]:
    """List the settings of a model that others make unused; none if its net is a user's, which may read any."""
    base, images, pooling = (model.get(name, "") for name in ("base", "images", "pooling"))
    if not base or "." in base:
        return set()
    pools = images in ("behavior", "both") and base != "two_tower"
    idle = set[str]().union(*(names for net, names in _OF_NETS.items() if net != base))
    read_by_pooling = SETTINGS_OF_POOLINGS.get(pooling, set())
    idle |= _OF_POOLINGS - read_by_pooling
    if images == "none":
        idle |= OF_IMAGES
    if images == "behavior":
        idle.add("id_proxy")
    if not pools:
        idle |= _OF_BEHAVIORS
    if base in ("lr", "two_tower"):
        idle.add("image_products")
    if base == "lr":
        idle.add("mlp")
    if base != "din" and not (pools and read_by_pooling >= _OF_ATTENTION):
        idle |= _OF_ATTENTION
    return idle
