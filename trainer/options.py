"""Settings of the model and its optimisers: types and limits, without torch, so quick to import."""

from typing import Annotated, Literal

from pydantic import Field, field_validator

from trainer.validate import Section

ComputeDType = Literal["bfloat16", "float32", "float64"]
Count = Annotated[int, Field(ge=1)]
LearningRate = Annotated[float, Field(gt=0, le=10)]
RateDecay = Annotated[float, Field(gt=0, le=1)]
Width = Annotated[int, Field(ge=1, le=65_536)]


class ModelConfig(Section):
    """The DICM: which images, how they are pooled, the widths, the rows of each ID table."""

    images: Literal["none", "ad", "behavior", "both"] = "both"
    """Which images the model sees; their ids are ID fields in all four."""
    pooling: Literal["sum", "attentive"] = "attentive"
    """How the vectors of the behaviour images become one."""
    shared_image_model: bool = True
    """One E for behaviour and ad images, or one each."""
    visual_width: Width = 12
    id_width: Width = 12
    """Width of an ID field's vector where the schema names none."""
    embed_hidden: list[Width] = Field(default=[256, 64])
    """E's hidden layers."""
    mlp: list[Width] = Field(default=[200, 80], min_length=1)
    """Hidden layers of the MLP."""
    attention_hidden: Width = 16
    """Hidden units that weigh a behaviour image against the ad."""
    compute_dtype: ComputeDType = "bfloat16"
    """Type of E's matrix products; its weights are float32 all the same."""
    table_shards: Count = 64
    """Shards of every ID table. A checkpoint loads at any number of ranks, but only at its own number of shards."""
    tables: dict[str, Count] = Field(default={})
    """Rows of each ID table, by name; ids are hashed into them, so the number is rounded up to fill every shard."""

    @field_validator("table_shards")
    @classmethod
    def _power_of_two(cls, value: int) -> int:
        if value & (value - 1):
            raise ValueError("it has to be a power of two, as 64")
        return value


class ExchangeConfig(Section):
    """How vectors travel between ranks."""

    wire_dtype: Literal["float32", "bfloat16"] = "float32"
    """Of vectors and their gradients on the way. float32: sent as they are; bfloat16: rounded, half of the bytes."""
    reuse_steps: Annotated[int, Field(ge=0, le=1000)] = 0
    """An owner may answer with a visual vector that is up to so many steps old. 0: never, which is exact."""


class OptimConfig(Section):
    """Adam, for dense parameters and, row-wise, for ID tables; every `lr_every` steps `lr` shrinks by `lr_gamma`."""

    lr: LearningRate = 0.001
    lr_gamma: RateDecay = 0.9
    lr_every: Count = 24_000
    beta1: Annotated[float, Field(ge=0, lt=1)] = 0.9
    beta2: Annotated[float, Field(ge=0, lt=1)] = 0.999
    eps: Annotated[float, Field(gt=0)] = 1e-8
