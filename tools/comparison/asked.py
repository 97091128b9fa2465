"""What is asked of a comparison: the settings that all rows share, the two budgets, and the rows."""

from typing import Any, Literal

from pydantic import Field, field_validator, model_validator

from semtok.settings import Config


class ComparisonSettings(Config):
    """What is the same for every row, and so may not change once there are results."""

    recipe: str = "dit"
    """Of every transformer: an embedded recipe's name, or a file."""
    precision: Literal["fp32", "bf16", "bf16_matmul"] = "fp32"
    """Of every transformer, where the recipe leaves it to the machine: measured once, so that rows do not differ."""
    data: tuple[str, ...] = ()
    """Data settings, as ``kind=folder``; none: each recipe's own, the embedded shapes."""
    teacher: tuple[str, ...] = ()
    """Teacher settings, as ``name=…``; none: each recipe's own."""
    cache: Literal["auto", "none"] = "none"
    """Whether transformers learn from latents that are computed once, where that pays, or from images, so that the
    seconds of every row hold the same work."""
    judge: tuple[tuple[str, ...], ...] = Field((("teacher",),), min_length=1)
    """Who sees images, for Fréchet distances and shares of classes, each by its words (``evaluation/judges``); rows are
    followed by the first."""
    recipe_share: float = Field(gt=0, le=1)
    """Tokenizers are trained for this share of their recipes' steps."""
    steps: int = Field(ge=1)
    """Of the diffusion transformer."""
    num_checkpoints: int = Field(5, ge=1)
    """Evenly spaced over the steps; images are generated at each."""
    settings: tuple[str, ...] = ()
    """Further settings of every diffusion transformer."""
    num_images: int = Field(ge=10)
    """Generated at each checkpoint."""
    num_held_out: int = Field(ge=20)
    """Real images that tokenizers are scored on."""
    num_train: int = Field(ge=20)
    """Real images that the probe is fitted on."""
    num_reference: int = Field(5000, ge=10, le=10_000)
    """Real training images that generated ones are compared with."""

    @field_validator("judge", mode="before")
    @classmethod
    def _each_by_its_words(cls, judge: Any) -> Any:
        """Lists may stand for tuples; an earlier version had one judge, by its word."""
        each = [judge] if isinstance(judge, str) else judge
        if not isinstance(each, list | tuple):
            return judge
        each = [(words,) if isinstance(words, str) else words for words in each]
        return tuple(tuple(words) if isinstance(words, list) else words for words in each)

    @model_validator(mode="after")
    def _even(self) -> "ComparisonSettings":
        if self.steps % self.num_checkpoints:
            raise ValueError(
                f"steps: {self.steps} is not a multiple of num_checkpoints {self.num_checkpoints}"
            )
        return self


BUDGETS = {
    "quick": ComparisonSettings(
        recipe_share=1 / 3,
        steps=480,
        num_checkpoints=3,
        settings=("sampler.steps=15",),
        num_images=270,
        num_held_out=400,
        num_train=1500,
    ),
    "full": ComparisonSettings(
        recipe_share=1.0, steps=2000, num_images=2000, num_held_out=1000, num_train=4000
    ),
}
SEEDS = {"quick": 1, "full": 3}


class Row(Config):
    """A tokenizer with the settings of the transformer on it.

    Attributes:
        tokenizer: an embedded recipe's name, also ``RECIPE@BASE``, or a reference to a trained tokenizer.
    """

    name: str = Field(pattern=r"^[A-Za-z0-9][\w.+-]*$")
    tokenizer: str
    settings: tuple[str, ...] = ()
