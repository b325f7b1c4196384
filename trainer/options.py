"""Settings of the model and its optimisers: sections of the run's configuration, without torch, so quick to import."""

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, PositiveFloat, PositiveInt

ComputeDType = Literal["bfloat16", "float32", "float64"]


class ModelConfig(BaseModel):
    """The DICM."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    images: Literal["none", "ad", "behavior", "both"] = "both"
    """Which images the model sees; their ids are ID fields in all four."""
    pooling: Literal["sum", "attentive"] = "attentive"
    """How the vectors of the behaviour images become one."""
    shared_image_model: bool = True
    """One E for behaviour and ad images, or one each."""
    visual_width: PositiveInt = 12
    id_width: PositiveInt = 12
    """Width of an ID field's vector where the schema names none."""
    hidden: tuple[PositiveInt, ...] = (200, 80)
    """The MLP's hidden layers."""
    image_hidden: tuple[PositiveInt, ...] = (256, 64)
    """E's hidden layers."""
    attention_hidden: PositiveInt = 16
    compute_dtype: ComputeDType = "bfloat16"
    """Type of E's matrix products; its weights are float32 all the same."""
    table_rows: PositiveInt = 1 << 18
    """Rows of an ID table; ids are hashed into them."""
    rows_of_table: dict[str, PositiveInt] = Field(default_factory=dict)
    """Rows of single tables, by table name, in place of `table_rows`."""
    table_shards: PositiveInt = 64
    """Shards of every ID table, a power of two. A checkpoint loads at any number of ranks, but not at another one of shards."""


class OptimConfig(BaseModel):
    """Adam, for dense parameters and, row-wise, for ID tables."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    learning_rate: PositiveFloat = 0.001
    id_learning_rate: PositiveFloat | None = None
    """Of the ID tables. Default: `learning_rate`."""
    decay: PositiveFloat = 0.9
    decay_every: PositiveInt = 24_000
    """Both rates are multiplied by `decay` after every so many steps."""
    beta1: float = Field(0.9, ge=0, lt=1)
    beta2: float = Field(0.999, ge=0, lt=1)
    eps: PositiveFloat = 1e-8
