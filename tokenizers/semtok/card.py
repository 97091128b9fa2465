"""Model cards: what an export's README says to readers and to the Hugging Face Hub."""

import hashlib
import json
import shlex
import shutil
from collections.abc import Mapping, Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import EvalResult, ModelCard, ModelCardData

from semtok.references import is_hub_id

README = "README.md"
PLACEHOLDER = "ORG/NAME"
"""In a card, where the repository's name will be."""
PICTURES = "pictures"
"""Their folder in an export."""
_TEMPLATE = "model_card.md"
_VAES = ("vae", "texture/vae", "tokenizer/vae", "tokenizer/texture/vae")
_EMBEDDED = "shapes ("  # data that the library renders itself
_UNITS = {"psnr": "PSNR (dB)", "ssim": "SSIM"}


def model_card(
    config: Mapping[str, Any],
    *,
    pictures: Sequence[str] = (),
    papers: Sequence[str] = (),
    vae: str | None = None,
    packages: Sequence[str] | None = None,
) -> str:
    """A card in Markdown, with the header that the Hub reads.

    Args:
        config: an export's ``config.json``; of a pipeline, what its generator's would hold.
        pictures: files in the export, by relative path.
        papers: to cite, one line each.
        vae: the folder in it that diffusers can load.
        packages: what the code of a pipeline for diffusers imports, as pip takes it; None: it is no pipeline.
    """
    trained, names = config.get("trained") or {}, config.get("class_names") or []
    card = ModelCard.from_template(
        card_data(config, library="semtok" if packages is None else "diffusers"),
        template_str=(files("semtok") / "assets" / _TEMPLATE).read_text(encoding="utf-8"),
        kind=config.get("kind", "tokenizer"),
        title=_title(config),
        version=config["library_version"],
        latents=config.get("latents"),
        reference=PLACEHOLDER,
        vae=vae,
        packages=None if packages is None else shlex.join(packages),
        loading="\n".join(loading_lines(PLACEHOLDER, names[:2])),
        class_names=names,
        pictures=pictures,
        rows=_rows(trained),
        has_recipe="recipe" in trained,
        papers=papers,
    )
    return f"{card}\n"


def loading_lines(reference: str, labels: Sequence[str]) -> list[str]:
    """Python that loads an exported pipeline and draws images of these classes; of any, if there are none."""
    words = [json.dumps(list(labels), ensure_ascii=False)] if labels else []
    return [
        "from diffusers import DiffusionPipeline",
        f"pipeline = DiffusionPipeline.from_pretrained({json.dumps(reference)}, trust_remote_code=True)",
        f"images = pipeline({', '.join([*words, 'seed=0'])}).images",
    ]


def write_readme(
    folder: Path,
    config: Mapping[str, Any],
    pictures: Mapping[str, Path],
    papers: Sequence[str] = (),
    *,
    packages: Sequence[str] | None = None,
) -> None:
    """Writes an export's card, the pictures on it, and the recipe.

    Args:
        config, papers, packages: see ``model_card``.
        pictures: files by the names that they get.
    """
    vae = next((name for name in _VAES if (folder / name).is_dir()), None)
    shown = {f"{PICTURES}/{name}{file.suffix}": file for name, file in pictures.items()}
    for name, file in shown.items():
        (folder / PICTURES).mkdir(exist_ok=True)
        shutil.copyfile(file, folder / name)
    card = model_card(config, pictures=list(shown), papers=papers, vae=vae, packages=packages)
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


def _rows(trained: Mapping[str, Any]) -> list[tuple[str, object]]:
    """Settings, and the figures that the held-out images gave."""
    recipe = trained.get("recipe") or {}
    train, teacher = recipe.get("train") or {}, trained.get("teacher") or {}
    rows = [
        ("imported from", trained.get("imported_from")),
        ("data", trained.get("data")),
        ("teacher", teacher.get("name")),
        ("steps", trained.get("steps", train.get("steps"))),
        ("images per step", train.get("batch_size")),
    ]
    metrics: Mapping[str, float] = trained.get("metrics") or {}
    rows += [(f"held-out {_UNITS.get(n, n)}", f"{value:.4g}") for n, value in metrics.items()]
    return [(name, value) for name, value in rows if value is not None]


def _data_type(data: str | None) -> str:
    """A word for the data: the Hub takes no spaces there."""
    return (data or "unknown").split(" ")[0]


def _base_models(trained: Mapping[str, Any]) -> list[str]:
    """Repositories on the Hub that the weights were started from or built on."""
    method = (trained.get("recipe") or {}).get("method") or {}
    references = (method.get("vae"), method.get("texture"))
    return [r for r in references if isinstance(r, str) and is_hub_id(r)]
