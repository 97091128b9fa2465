"""What a comparison consists of: settings that all rows share, the rows, and the work that they need."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import Field

from semtok.config import Config, parse, read_yaml
from semtok.errors import UserError
from semtok.recipe import load_diffusion_recipe, load_recipe, write_recipe
from semtok.references import find_recipe, locate_export, recipe_folder

SETTINGS_FILE = "comparison.yaml"
TEXTURE = "vae"
"""The recipe that every composite's image latents come from, so that rows differ in one thing."""


class ComparisonSettings(Config):
    """What is the same for every row, and so may not change once there are results."""

    data: tuple[str, ...] = ()
    """Data settings, as ``kind=folder``; none: each recipe's own, the embedded shapes."""
    teacher: tuple[str, ...] = ()
    """Teacher settings, as ``name=…``; none: each recipe's own, the embedded teacher."""
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


BUDGETS = {
    "quick": ComparisonSettings(
        recipe_share=1 / 3,
        steps=400,
        num_checkpoints=4,
        num_images=300,
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
        tokenizer: an embedded recipe's name, or a reference to a trained tokenizer.
    """

    name: str = Field(pattern=r"^[\w.+-]+$")
    tokenizer: str
    settings: tuple[str, ...] = ()


@dataclass(frozen=True)
class Comparison:
    """A comparison in its folder.

    Attributes:
        rows: the first is the one that others are measured against.
    """

    folder: Path
    settings: ComparisonSettings
    rows: tuple[Row, ...]
    num_seeds: int

    @property
    def seeds(self) -> range:
        return range(self.num_seeds)

    @property
    def tokenizers(self) -> list[str]:
        """References of all rows, each once, those that others are built on first."""
        names = list(dict.fromkeys(row.tokenizer for row in self.rows))
        needed = any(_is_composite(name) for name in names)
        return [TEXTURE, *(n for n in names if n != TEXTURE)] if needed else names

    @property
    def steps(self) -> list[int]:
        """At which images are generated."""
        num = min(self.settings.num_checkpoints, self.settings.steps)
        every = self.settings.steps // num
        return [every * (i + 1) for i in range(num)]

    def tokenizer_folder(self, reference: str, seed: int) -> Path:
        """Of a tokenizer that the comparison trains."""
        return self.folder / "tokenizers" / f"{reference}-{seed}"

    def tokenizer_reference(self, reference: str, seed: int) -> str:
        """What to load: one that was trained before is the same for each seed."""
        if find_recipe(reference) is None:
            return reference
        return str(self.tokenizer_folder(reference, seed))

    def generator_folder(self, row: Row, seed: int) -> Path:
        return self.folder / "generators" / f"{row.name}-{seed}"

    def tokenizer_scores(self, reference: str, seed: int) -> Path:
        name = reference.strip("/").replace("/", "_")
        return self.folder / "scores" / f"tokenizer_{name}-{seed}.json"

    def generator_scores(self, row: Row, seed: int) -> Path:
        return self.folder / "scores" / f"generator_{row.name}-{seed}.json"

    def tokenizer_overrides(self, reference: str, seed: int) -> list[str]:
        """Settings beside the recipe's own."""
        path = find_recipe(reference)
        assert path is not None
        content = read_yaml(path)
        words = [f"train.seed={seed}", *_prefixed("data", self.settings.data)]
        if "teacher" in content:
            words += _prefixed("teacher", self.settings.teacher)
        if _is_composite(reference):
            words.append(f"method.texture={self.tokenizer_folder(TEXTURE, seed)}")
        train = content["train"]
        if train["steps"] and self.settings.recipe_share < 1:
            steps = max(1, round(train["steps"] * self.settings.recipe_share))
            warmup = min(train.get("warmup_steps", 0), steps)
            words += [f"train.steps={steps}", f"train.warmup_steps={warmup}"]
        return words

    def generator_overrides(self, row: Row, seed: int) -> list[str]:
        """Settings beside those of the embedded recipe: a constant rate, so that every step is the end of
        a training of that length, and no guidance, as in the papers' main tables."""
        steps = self.steps
        words = [
            f"train.seed={seed}",
            *_prefixed("data", self.settings.data),
            f"train.steps={self.settings.steps}",
            f"train.warmup_steps={min(100, self.settings.steps)}",
            "train.schedule=constant",
            f"train.checkpoint_every={steps[0]}",
            f"train.keep_last={len(steps) + 1}",
            f"train.sample_every={self.settings.steps}",
            f"train.log_every={_divisor_near(steps[0], 50)}",
            "sampler.guidance.scale=1",
            *self.settings.settings,
            *row.settings,
        ]
        aligned = any(word.startswith("diffusion.repa") for word in row.settings)
        named = any(word.startswith("teacher.") for word in row.settings)
        if aligned and not named and not _is_composite(row.tokenizer):
            words += _prefixed("teacher", self.settings.teacher or ("name=demo",))
        return words

    def check(self) -> None:
        """Reads every recipe with its settings, so that nothing is found wrong after hours.

        Raises:
            UserError: names used twice, references to nothing, settings that can't be.
        """
        names = [row.name for row in self.rows]
        for name in names:
            if names.count(name) > 1:
                raise UserError(f"--variant: two rows are called '{name}'; choose another name")
        for reference in self.tokenizers:
            recipe = find_recipe(reference)
            if recipe is None:
                locate_export(reference, "tokenizer")
            else:
                load_recipe(recipe, self.tokenizer_overrides(reference, 0))
        for row in self.rows:
            load_diffusion_recipe(
                diffusion_recipe(), self.generator_overrides(row, 0), tokenizer=row.tokenizer
            )

    def claim(self) -> None:
        """Takes the folder, or goes on in it: rows and seeds may be added, settings may not change.

        Raises:
            UserError: the folder holds another comparison, or something else.
        """
        file = self.folder / SETTINGS_FILE
        if not file.exists():
            if self.folder.exists() and (not self.folder.is_dir() or any(self.folder.iterdir())):
                raise UserError(f"{self.folder}: is not empty and no comparison; choose --output")
        else:
            before = parse(_Record, read_yaml(file), str(file))
            for key, value in before.settings.model_dump().items():
                if value != getattr(self.settings, key):
                    raise UserError(
                        f"{self.folder}: begun with {key}={value}, now {getattr(self.settings, key)}; "
                        "choose another --output"
                    )
            for row in before.rows:
                mine = next((r for r in self.rows if r.name == row.name), row)
                if mine != row:
                    raise UserError(
                        f"{self.folder}: row '{row.name}' meant something else; choose another name"
                    )
        old = before.rows if file.exists() else ()
        rows = list({row.name: row for row in (*old, *self.rows)}.values())
        self.folder.mkdir(parents=True, exist_ok=True)
        write_recipe(_Record(settings=self.settings, rows=tuple(rows)), file)


class _Record(Config):
    settings: ComparisonSettings
    rows: tuple[Row, ...]


def read_comparison(folder: Path) -> Comparison:
    """The comparison that was begun in a folder."""
    file = folder / SETTINGS_FILE
    record = parse(_Record, read_yaml(file), str(file))
    return Comparison(folder, record.settings, record.rows, num_seeds=0)


def diffusion_recipe() -> Path:
    """The embedded recipe of the transformer."""
    folder = recipe_folder()
    if folder is None:
        raise UserError("no recipes folder beside the library; run from a checkout")
    return folder / "dit.yaml"


def _is_composite(reference: str) -> bool:
    path = find_recipe(reference)
    if path is None:
        return False
    content: dict[str, Any] = read_yaml(path)
    return "texture" in content["method"]


def _prefixed(section: str, words: tuple[str, ...]) -> list[str]:
    return [f"{section}.{word}" for word in words]


def _divisor_near(number: int, wanted: int) -> int:
    """The largest divisor that is at most ``wanted``: logs then fall on every checkpoint."""
    return max(d for d in range(1, min(number, wanted) + 1) if number % d == 0)
