"""What a comparison consists of: its rows with all their settings, and its folder."""

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from comparison.asked import ComparisonSettings, Row
from comparison.jobs import LOCK
from comparison.recipes import (
    TEXTURE,
    base_of,
    base_setting,
    file_name,
    has_teacher,
    is_composite,
    recipe_of,
)
from semtok.commands.around_training import errors_at
from semtok.commands.train_tokenizer import build_objective
from semtok.data.images.kinds import open_sources
from semtok.data.source import DataConfig
from semtok.errors import UserError
from semtok.evaluation.inception import check_torch_fidelity
from semtok.evaluation.judges import JudgeChoice, check_judges, judge_choices
from semtok.recipe import load_diffusion_recipe, load_recipe, locate_recipe, write_recipe
from semtok.references import DEMO, locate_export
from semtok.settings import Config, apply_overrides, parse, read_yaml
from semtok.teachers import Teacher, TeacherConfig
from semtok.tokenizer import Tokenizer

SETTINGS_FILE = "comparison.yaml"
_RESERVED = (
    "tokenizer",
    "data.",
    "train.seed",
    "train.steps",
    "train.schedule",
    "train.warmup_steps",
    "train.checkpoint_every",
    "train.keep_last",
    "train.sample_every",
    "train.log_every",
)

# A row may learn by another optimiser, as of other settings; it sees as many images.
_SHARED = (*_RESERVED, "train.batch_size", "train.num_")


@dataclass(frozen=True)
class Comparison:
    """A comparison in its folder."""

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
        return list(dict.fromkeys([*self.bases, *(row.tokenizer for row in self.rows)]))

    @property
    def bases(self) -> list[str]:
        """References of what others are built on or start from, each after its own."""
        found: list[str] = []
        for row in self.rows:
            name = base_of(row.tokenizer)
            while name is not None:
                found.insert(0, name)
                name = base_of(name)
        return list(dict.fromkeys(found))

    @property
    def steps(self) -> list[int]:
        """At which images are generated."""
        every = self.settings.steps // self.settings.num_checkpoints
        return list(range(every, self.settings.steps + 1, every))

    def tokenizer_folder(self, reference: str, seed: int) -> Path:
        """Of a tokenizer that the comparison trains."""
        return self.folder / "tokenizers" / f"{file_name(reference)}-{seed}"

    def tokenizer_reference(self, reference: str, seed: int) -> str:
        """What to load: one that was trained before is the same for each seed."""
        if recipe_of(reference) is None:
            return reference
        return str(self.tokenizer_folder(reference, seed))

    def generator_folder(self, row: Row, seed: int) -> Path:
        return self.folder / "generators" / f"{row.name}-{seed}"

    def tokenizer_scores(self, reference: str, seed: int) -> Path:
        """One file for all seeds of a tokenizer that was trained before."""
        if recipe_of(reference) is not None:
            return self.folder / "scores" / f"tokenizer_{file_name(reference)}-{seed}.json"
        digest = hashlib.blake2b(reference.encode(), digest_size=4).hexdigest()
        return self.folder / "scores" / f"tokenizer_{Path(reference).name}-{digest}.json"

    def generator_scores(self, row: Row, seed: int) -> Path:
        return self.folder / "scores" / f"generator_{row.name}-{seed}.json"

    def tokenizer_overrides(
        self, reference: str, seed: int, *, vae: str | None = None
    ) -> list[str]:
        """Settings beside the recipe's own.

        Args:
            vae: in the place of what it is built on, which may not be trained yet.
        """
        path = recipe_of(reference)
        assert path is not None
        content = read_yaml(path)
        words = [f"train.seed={seed}", *_prefixed("data", self.settings.data)]
        if "teacher" in content:
            words += _prefixed("teacher", self.settings.teacher)
        base, setting = base_of(reference), base_setting(reference)
        if base is not None:
            words.append(f"{setting}={vae or self.tokenizer_reference(base, seed)}")
        if setting == "method.texture":
            # It is trained on the same images, for as long as the comparison says.
            words.append("method.min_texture_psnr=0")
        train = content["train"]
        if train["steps"] and self.settings.recipe_share < 1:
            steps = max(1, round(train["steps"] * self.settings.recipe_share))
            warmup = min(train.get("warmup_steps", 0), steps)
            words += [f"train.steps={steps}", f"train.warmup_steps={warmup}"]
        return words

    def generator_overrides(self, row: Row, seed: int) -> list[str]:
        """Settings beside those of the recipe: a constant rate, so that every step is the end of
        a training of that length, and no guidance, as in the papers' main tables."""
        steps = self.steps
        words = [
            f"train.seed={seed}",
            *_prefixed("data", self.settings.data),
            *([f"train.precision={self.settings.precision}"] if self.is_automatic else []),
            f"train.steps={self.settings.steps}",
            f"train.warmup_steps={min(100, self.settings.steps)}",
            "train.schedule=constant",
            f"train.checkpoint_every={steps[0]}",
            "train.keep_last=100000",  # whatever interruptions add, all are there to be scored
            f"train.sample_every={self.settings.steps}",
            f"train.log_every={_divisor_near(steps[0], 50)}",
            "sampler.guidance={}",  # also no interval, which would have no effect
            f"data.cache={self.settings.cache}",
            *self.settings.settings,
            *row.settings,
        ]
        own = (*self.settings.settings, *row.settings)
        aligned = any(word.startswith("diffusion.repa") for word in own)
        named = any(word.startswith("teacher.") for word in own)
        if aligned and not named and not has_teacher(row.tokenizer):
            words += _prefixed("teacher", self.teacher_words)
        return words

    @property
    def recipe(self) -> Path:
        """Of every transformer."""
        return locate_recipe(self.settings.recipe)

    @property
    def is_automatic(self) -> bool:
        """Whether the recipe leaves the precision to the machine."""
        train = read_yaml(self.recipe).get("train")
        return isinstance(train, dict) and train.get("precision") == "auto"

    def data(self) -> DataConfig:
        """The images of every row: the transformer's recipe's, with the data settings applied."""
        words = _prefixed("data", self.settings.data)
        return load_diffusion_recipe(self.recipe, words, tokenizer=TEXTURE).data

    def teacher(self) -> Teacher:
        """The teacher that predictors, and scores where it is the judge, see by: its last layer."""
        return Teacher(self.teacher_config())

    @property
    def teacher_words(self) -> tuple[str, ...]:
        """The settings of ``teacher``: as given, or the network of the first recipe that learns by one; where none
        does, the embedded one."""
        if self.settings.teacher:
            return self.settings.teacher
        for recipe in filter(None, (recipe_of(row.tokenizer) for row in self.rows)):
            own = read_yaml(recipe).get("teacher", {})
            if own:
                known = ("name", "checkpoint", "input_size")
                return tuple(f"{key}={own[key]}" for key in known if own.get(key) is not None)
        return ("name=demo",)

    def teacher_config(self) -> TeacherConfig:
        content = apply_overrides({}, list(self.teacher_words))
        return parse(TeacherConfig, content, "--teacher")

    def judges(self) -> tuple[JudgeChoice, ...]:
        """Who sees images; rows are followed by the first."""
        return judge_choices(self.settings.judge, self.teacher_config())

    def check(self) -> None:
        """Reads every recipe with its settings, the data and the teacher, so that nothing is found wrong
        after hours.

        Raises:
            UserError: names used twice, references to nothing, settings that can't be, or that would make
                rows differ in more than they say.
        """
        check_torch_fidelity()
        names = [row.name for row in self.rows]
        for name in names:
            if names.count(name) > 1:
                raise UserError(f"two rows are called '{name}'; name one by NAME=REF")
        _check_words("--set", self.settings.settings, _RESERVED)
        for row in self.rows:
            _check_words(f"--variant {row.name}", row.settings, _SHARED)
        train, _ = open_sources(self.data())
        self.teacher()
        check_judges(self.judges(), train)
        for reference in self.tokenizers:
            recipe = recipe_of(reference)
            if recipe is None:
                tokenizer = Tokenizer.from_pretrained(reference)
                with errors_at(f"--data with {reference}"):
                    tokenizer.check_image_size(train.image_size)
            else:
                texture = Tokenizer.from_pretrained(DEMO) if is_composite(reference) else None
                parsed = load_recipe(recipe, self.tokenizer_overrides(reference, 0, vae=DEMO))
                build_objective(parsed, texture, place=str(recipe), class_names=train.class_names)
        for row in self.rows:
            load_diffusion_recipe(
                self.recipe, self.generator_overrides(row, 0), tokenizer=row.tokenizer
            )

    def claim(self) -> None:
        """Takes the folder, or goes on in it: rows and seeds may be added, nothing else may change. Only
        who holds the folder may ask for it, see ``jobs.only_one_in``.

        Raises:
            UserError: the folder holds another comparison.
        """
        file = self.folder / SETTINGS_FILE
        mine = _Record(
            settings=self.settings,
            rows=self.rows,
            tokenizers={reference: _fingerprint(reference) for reference in self.tokenizers},
            recipe=_digest(self.recipe),
        )
        if file.exists():
            before = parse(_Record, read_yaml(file), str(file))
            self._check_unchanged(before, mine)
            rows = {row.name: row for row in (*before.rows, *mine.rows)}
            mine = mine.model_copy(
                update={
                    "rows": tuple(rows.values()),
                    "tokenizers": before.tokenizers | mine.tokenizers,
                }
            )
        write_recipe(mine, file)

    def check_folder(self) -> None:
        """Raises UserError where the folder holds something else than a comparison."""
        folder = self.folder
        others = [p for p in folder.iterdir() if p.name != LOCK] if folder.is_dir() else []
        taken = others or folder.is_file()
        if taken and not (folder / SETTINGS_FILE).is_file():
            raise UserError(f"{folder}: is not empty and no comparison; choose --output")

    def _check_unchanged(self, before: "_Record", mine: "_Record") -> None:
        if before.recipe not in (None, mine.recipe):
            raise UserError(
                f"{self.folder}: {self.recipe} has changed since; choose another --output"
            )
        for key, value in before.settings.model_dump().items():
            if key == "recipe_share" and value != self.settings.recipe_share:
                budget = "full" if value == 1 else "quick"
                raise UserError(
                    f"{self.folder}: tokenizers were trained for {value:.0%} of their recipes' steps, now "
                    f"{self.settings.recipe_share:.0%}; go on with --budget {budget}, or choose another --output"
                )
            if value != getattr(self.settings, key):
                before_told, now = _in_words(value), _in_words(getattr(self.settings, key))
                raise UserError(
                    f"{self.folder}: begun with {key}={before_told}, now {now}; choose another --output"
                )
        rows = {row.name: row for row in before.rows}
        for row in mine.rows:
            if rows.get(row.name, row) != row:
                raise UserError(
                    f"{self.folder}: row '{row.name}' meant something else; choose another name"
                )
        for reference, fingerprint in mine.tokenizers.items():
            if before.tokenizers.get(reference, fingerprint) != fingerprint:
                raise UserError(
                    f"{self.folder}: tokenizer '{reference}' has changed since; choose another --output"
                )


class _Record(Config):
    """What a comparison's folder remembers of it."""

    settings: ComparisonSettings
    rows: tuple[Row, ...]
    tokenizers: dict[str, str]
    """Fingerprints, by reference."""
    recipe: str | None = None
    """The transformers' fingerprint; None: an earlier version noted none."""


def read_comparison(folder: Path, num_seeds: int) -> Comparison:
    """The comparison that was begun in a folder."""
    file = folder / SETTINGS_FILE
    record = parse(_Record, read_yaml(file), str(file))
    return Comparison(folder, record.settings, record.rows, num_seeds)


def _fingerprint(reference: str) -> str:
    """A digest of what a reference means: a recipe's text, or the files of a trained tokenizer."""
    recipe = recipe_of(reference)
    if recipe is not None:
        return _digest(recipe)
    digest = hashlib.blake2b(digest_size=8)
    folder = locate_export(reference, "tokenizer")
    for file in sorted(p for p in folder.rglob("*") if p.is_file()):
        digest.update(file.relative_to(folder).as_posix().encode())
        digest.update(file.read_bytes())
    return digest.hexdigest()


def _digest(recipe: Path) -> str:
    return hashlib.blake2b(recipe.read_bytes(), digest_size=8).hexdigest()


def _check_words(place: str, words: tuple[str, ...], reserved: tuple[str, ...]) -> None:
    for word in words:
        if word.startswith(reserved):
            raise UserError(
                f"{place}: {word.split('=')[0]} is the same for every row, as the comparison's own options say"
            )


def _in_words(value: Any) -> Any:
    """A setting's value for a message: the words of judges as they are given."""
    is_words = isinstance(value, tuple) and value and isinstance(value[0], tuple)
    return " --judge ".join(" ".join(words) for words in value) if is_words else value


def _prefixed(section: str, words: tuple[str, ...]) -> list[str]:
    return [f"{section}.{word}" for word in words]


def _divisor_near(number: int, wanted: int) -> int:
    """The largest divisor that is at most ``wanted``: logs then fall on every checkpoint."""
    return max(d for d in range(1, min(number, wanted) + 1) if number % d == 0)
