"""The base of every settings class."""

from pydantic import BaseModel, ConfigDict


class Config(BaseModel):
    """A frozen, strict model: unknown keys and wrong types are errors, defaults stand in one place.

    Each config class stands beside the class that it configures.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)
