"""Model cards: what an export's README says to readers and to the Hugging Face Hub."""

import hashlib
import json
import shlex
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import EvalResult, ModelCardData

from semtok.references import is_hub_id

README = "README.md"
PLACEHOLDER = "ORG/NAME"
"""In a card, where the repository's name will be."""
PICTURES = "pictures"
"""Their folder in an export."""
_VAES = ("vae", "texture/vae", "tokenizer/vae", "tokenizer/texture/vae")
_FROM_PRETRAINED = ("from semtok import {0}", 'model = {0}.from_pretrained("{{reference}}")')
_PART = ("from semtok.hub.modules import load_part", 'model = load_part("{reference}")')
_KINDS = {
    "tokenizer": (
        "an image tokenizer",
        *(line.format("Tokenizer") for line in _FROM_PRETRAINED),
        "latents = model.encode(images)  # PIL images",
    ),
    "generator": (
        "an image generator",
        *(line.format("Generator") for line in _FROM_PRETRAINED),
        "pixels = model.sample([0, 1], seed=0)",
    ),
    "network": (
        "the network of an image generator, without a tokenizer,",
        *_PART,
        "velocity = model(latents, times, labels).velocity",
    ),
    "coder": (
        "a coder of a vision model's features",
        *_PART,
        "mean, std = model.encode(features)  # (B, D, h, w)",
    ),
}
_EMBEDDED = "shapes ("  # data that the library renders itself
_UNITS = {"psnr": "PSNR (dB)", "ssim": "SSIM"}


def model_card(
    config: Mapping[str, Any],
    *,
    pictures: Sequence[str] = (),
    papers: Sequence[str] = (),
    vae: str | None = None,
    reference: str = PLACEHOLDER,
) -> str:
    """A card in Markdown, with the header that the Hub reads.

    Args:
        config: an export's ``config.json``.
        pictures: files in the export, by relative path.
        papers: to cite, one line each.
        vae: the folder in it that diffusers can load.
        reference: what ``from_pretrained`` takes.
    """
    what, *code = _KINDS[config.get("kind", "tokenizer")]
    lines = [
        f"{what[0].upper()}{what[1:]} made by semtok {config['library_version']}. "
        f"{_latents(config)}",
        "",
        "```python",
        *(line.replace("{reference}", reference) for line in code),
        "```",
        "",
    ]
    if vae is not None:
        lines += [
            "Its image autoencoder loads in diffusers alone: "
            f'`AutoencoderKL.from_pretrained("{reference}", subfolder="{vae}")`.',
            "",
        ]
    return _card(config, card_data(config), lines, pictures, papers)


def pipeline_card(
    config: Mapping[str, Any],
    *,
    packages: Sequence[str],
    pictures: Sequence[str] = (),
    papers: Sequence[str] = (),
    reference: str = PLACEHOLDER,
) -> str:
    """The card of a generator that was exported as a diffusers pipeline.

    Args:
        config: what a generator's ``config.json`` holds.
        packages: what the pipeline's code imports, as pip takes it.
        pictures, papers, reference: see ``model_card``.
    """
    names = config["class_names"]
    if names:
        shown = ", ".join(names[:8]) + (f" and {len(names) - 8} more" if len(names) > 8 else "")
        labels = f"Classes are named ({shown}) or numbered; `None` is any class."
    else:
        labels = "It has no classes; `num_images_per_class` is how many images are drawn."
    lines = [
        "An image generator for diffusers, which brings its own code. It was made by semtok "
        f"{config['library_version']}, and runs without it. {_latents(config)}",
        "",
        "```bash",
        f"pip install {' '.join(shlex.quote(package) for package in packages)}",
        "```",
        "",
        "```python",
        *loading_lines(reference, names[:2]),
        "```",
        "",
        f"{labels} Image i of a seed is the same in a batch of any size. `num_inference_steps` and "
        "`guidance_scale` (a number, or one for each part of the latents) are by default the model's own.",
        "",
    ]
    return _card(config, card_data(config, library="diffusers"), lines, pictures, papers)


def loading_lines(reference: str, labels: Sequence[str]) -> list[str]:
    """Python that loads an exported pipeline and draws images of these classes; of any, if there are none."""
    words = [json.dumps(list(labels), ensure_ascii=False)] if labels else []
    return [
        "from diffusers import DiffusionPipeline",
        f"pipeline = DiffusionPipeline.from_pretrained({json.dumps(reference)}, trust_remote_code=True)",
        f"images = pipeline({', '.join([*words, 'seed=0'])}).images",
    ]


def _card(
    config: Mapping[str, Any],
    header: ModelCardData,
    use: Sequence[str],
    pictures: Sequence[str],
    papers: Sequence[str],
) -> str:
    trained = config.get("trained") or {}
    lines = ["---", header.to_yaml().strip(), "---", "", f"# {_title(config)}", "", *use]
    for picture in pictures:
        lines += [f"![{picture}]({picture})", ""]
    rows = [*_settings(trained), *_figures(trained)]
    if rows:
        lines += ["| training | |", "|---|---|", *(f"| {k} | {v} |" for k, v in rows), ""]
    if "recipe" in trained:
        lines += ["All settings are in `recipe.yaml`.", ""]
    if papers:
        lines += ["Please cite:", "", *(f"- {paper}" for paper in papers), ""]
    return "\n".join(lines)


def write_readme(
    folder: Path,
    config: Mapping[str, Any],
    pictures: Mapping[str, Path],
    papers: Sequence[str] = (),
) -> None:
    """Writes an export's card, the pictures on it, and the recipe.

    Args:
        pictures: files by the names that they get.
    """
    vae = next((name for name in _VAES if (folder / name).is_dir()), None)
    shown = _copy_pictures(folder, pictures)
    _write_card(folder, config, model_card(config, pictures=shown, papers=papers, vae=vae))


def write_pipeline_readme(
    folder: Path,
    config: Mapping[str, Any],
    pictures: Mapping[str, Path],
    papers: Sequence[str],
    packages: Sequence[str],
) -> None:
    """Writes an exported pipeline's card, the pictures on it, and the recipe.

    Args:
        packages: see ``pipeline_card``.
        pictures: files by the names that they get.
    """
    shown = _copy_pictures(folder, pictures)
    card = pipeline_card(config, packages=packages, pictures=shown, papers=papers)
    _write_card(folder, config, card)


def _copy_pictures(folder: Path, pictures: Mapping[str, Path]) -> list[str]:
    """Their paths in the export."""
    for name, file in pictures.items():
        (folder / PICTURES).mkdir(exist_ok=True)
        shutil.copyfile(file, folder / PICTURES / f"{name}{file.suffix}")
    return [f"{PICTURES}/{name}{file.suffix}" for name, file in pictures.items()]


def _write_card(folder: Path, config: Mapping[str, Any], card: str) -> None:
    (folder / README).write_text(card, encoding="utf-8")
    recipe = (config.get("trained") or {}).get("recipe")
    if recipe:
        text = yaml.safe_dump(recipe, sort_keys=False, allow_unicode=True)
        (folder / "recipe.yaml").write_text(text, encoding="utf-8")


def card_data(config: Mapping[str, Any], *, library: str = "semtok") -> ModelCardData:
    """The card's header: library, tags, license, data, what it was started from, and scores.

    Args:
        library: that loads the export.
    """
    trained = config.get("trained") or {}
    metrics: Mapping[str, float] = trained.get("metrics") or {}
    data = trained.get("data")
    kind = config.get("kind", "tokenizer")
    results = [
        EvalResult(
            task_type="image-to-image" if kind == "tokenizer" else "unconditional-image-generation",
            dataset_type=_data_type(data),
            dataset_name=f"{data}, held out",
            metric_type=name,
            metric_value=round(float(value), 6),
        )
        for name, value in metrics.items()
    ]
    return ModelCardData(
        library_name=library,
        tags=["semtok", f"image-{kind}", *([config["method"]] if "method" in config else [])],
        # Weights that were trained on somebody's images are that somebody's to license.
        license="apache-2.0" if data and data.startswith(_EMBEDDED) else "other",
        datasets=[_data_type(data)] if data else None,
        base_model=_base_models(trained) or None,
        metrics=list(metrics) or None,
        model_name=_title(config) if results else None,
        eval_results=results or None,
    )


def provenance(config: Mapping[str, Any]) -> dict[str, str]:
    """What the header of an export's tensor files says of them: versions, method, and the recipe's digest."""
    trained = config.get("trained") or {}
    about = {"library": "semtok", "library_version": str(config["library_version"])}
    if "method" in config:
        about["method"] = str(config["method"])
    if "recipe" in trained:
        text = json.dumps(trained["recipe"], sort_keys=True)
        about["recipe"] = hashlib.blake2b(text.encode(), digest_size=16).hexdigest()
    return about


def _title(config: Mapping[str, Any]) -> str:
    trained = config.get("trained") or {}
    size = "x".join(map(str, config.get("image_size") or trained.get("image_size") or ())) or None
    name = config.get("method") or (config.get("diffusion") or {}).get("network")
    name = name if isinstance(name, str) else "diffusion transformer"
    return f"{name}, {size} pixels" if size else name


def _latents(config: Mapping[str, Any]) -> str:
    if "latents" not in config:
        return ""
    parts = [
        f"{part['name']} {part['channels']} channels"
        + (f" (stride {part['stride']})" if part.get("stride") else "")
        for part in config["latents"]
    ]
    return f"Latents, standardised: {', '.join(parts)}."


def _settings(trained: Mapping[str, Any]) -> list[tuple[str, object]]:
    recipe = trained.get("recipe") or {}
    train, teacher = recipe.get("train") or {}, trained.get("teacher") or {}
    rows = [
        ("imported from", trained.get("imported_from")),
        ("data", trained.get("data")),
        ("teacher", teacher.get("name")),
        ("steps", train.get("steps")),
        ("images per step", train.get("batch_size")),
    ]
    return [(name, value) for name, value in rows if value is not None]


def _figures(trained: Mapping[str, Any]) -> list[tuple[str, object]]:
    metrics: Mapping[str, float] = trained.get("metrics") or {}
    return [(f"held-out {_UNITS.get(n, n)}", f"{value:.4g}") for n, value in metrics.items()]


def _data_type(data: str | None) -> str:
    """A word for the data: the Hub takes no spaces there."""
    return (data or "unknown").split(" ")[0]


def _base_models(trained: Mapping[str, Any]) -> list[str]:
    """Repositories on the Hub that the weights were started from or built on."""
    method = (trained.get("recipe") or {}).get("method") or {}
    references = (method.get("vae"), method.get("texture"))
    return [r for r in references if isinstance(r, str) and is_hub_id(r)]
