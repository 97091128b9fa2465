"""The base of every settings class."""

from pydantic import BaseModel, ConfigDict


class Config(BaseModel):
    """A frozen, strict model: unknown keys and wrong types are errors, defaults stand in one place.

    Each config class stands beside the class that it configures.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)


def first_changed(config: Config, *names: str) -> str | None:
    """The first of these settings that is not its default; None: all are."""
    fields = type(config).model_fields
    return next((name for name in names if getattr(config, name) != fields[name].default), None)
