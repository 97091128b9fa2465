"""Model cards: what an export's README says to readers and to the Hugging Face Hub."""

import hashlib
import json
import math
import re
import shlex
import shutil
from collections.abc import Mapping, Sequence
from functools import cache
from importlib.resources import files
from pathlib import Path
from typing import Any

import jinja2
import yaml
from huggingface_hub import EvalResult, ModelCard, ModelCardData
from safetensors import safe_open

from semtok.references import is_hub_id
from semtok.settings import read_yaml
from semtok.storage import read_json

README = "README.md"
PLACEHOLDER = "ORG/NAME"
"""In a card, where the repository's name will be."""
PICTURES = "pictures"
"""Their folder in an export."""
_TEMPLATE = "model_card.md"
_PAPERS = Path(str(files("semtok") / "assets" / "papers.yaml"))
_VAES = ("vae", "texture/vae", "tokenizer/vae", "tokenizer/texture/vae")
_EMBEDDED = "shapes ("  # data that the library renders itself
_LABELS = {"psnr": "PSNR (dB)", "ssim": "SSIM"}
_OF_TRAINING = ("velocity", "kl_per_dim")
"""How names of metrics begin that compare a training with itself, and tell nobody how good a model is."""
_FEW_IMAGES = 10_000_000
"""The papers' shortest runs see more: 50 epochs of ImageNet are 64 million."""
_GENERATES = ("generator", "network")


def model_card(
    config: Mapping[str, Any],
    *,
    pictures: Sequence[str] = (),
    papers: Sequence[str] = (),
    vae: tuple[str, str] | None = None,
    packages: Sequence[str] | None = None,
    parameters: Mapping[str, int] | None = None,
) -> str:
    """A card in Markdown, with the header that the Hub reads.

    Args:
        config: an export's ``config.json``; of a pipeline, what its generator's would hold.
        pictures: files in the export, by relative path.
        papers: to cite, one line each.
        vae: the folder in it that diffusers can load, and the class there.
        packages: what the code of a pipeline for diffusers imports, as pip takes it; None: it is no pipeline.
        parameters: of each network, by name.
    """
    trained, names = config.get("trained") or {}, config.get("class_names") or []
    header = card_data(config, library="semtok" if packages is None else "diffusers")
    content = _template().render(
        header.to_dict(),
        card_data=header.to_yaml(),
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
        rows=_rows(config, parameters or {}),
        has_recipe="recipe" in trained,
        licence=trained.get("licence"),
        is_embedded=_is_embedded(trained),
        limits=_limits(config),
        papers=papers,
        bibtex="\n\n".join(filter(None, map(bibtex, papers))),
    )
    return f"{ModelCard(content)}\n"


@cache
def _template() -> jinja2.Template:
    """As ``ModelCard.from_template`` makes it, once: it takes longer than all else of a card."""
    return jinja2.Template((files("semtok") / "assets" / _TEMPLATE).read_text(encoding="utf-8"))


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
    card = model_card(
        config,
        pictures=list(shown),
        papers=papers,
        vae=vae and (vae, read_json(folder / vae / "config.json")["_class_name"]),
        packages=packages,
        parameters=count_parameters(folder),
    )
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
    metrics = _telling(trained)
    data = trained.get("data")
    kind = config.get("kind", "tokenizer")
    is_conditional = kind in _GENERATES and _num_classes(config) > 1
    is_ours = _is_embedded(trained)
    results = [
        EvalResult(
            task_type="image-to-image",  # what is measured is reconstruction
            dataset_type=_data_type(data),
            dataset_name=f"{data}, held out",
            metric_type=name,
            metric_value=round(float(value), 6),
        )
        for name, value in metrics.items()
    ]
    return ModelCardData(
        library_name=library,
        pipeline_tag="unconditional-image-generation"
        if kind in _GENERATES
        else "image-feature-extraction",
        tags=[
            "semtok",
            f"image-{kind}",
            *(["class-conditional"] if is_conditional else []),
            *([config["method"]] if "method" in config else []),
        ],
        # Weights that were trained on somebody's images are that somebody's to license.
        license="apache-2.0" if is_ours else "other",
        license_name=None if is_ours else "not-stated",
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


def count_parameters(folder: Path) -> dict[str, int]:
    """Numbers in the networks of an export, by the folder or the file that holds each; statistics of a few
    numbers are left out."""
    counts: dict[str, int] = {}
    for file in sorted(folder.rglob("*.safetensors")):
        place = file.parent.relative_to(folder).as_posix()
        with safe_open(file, "pt") as content:
            names = content.keys()
            num = sum(math.prod(content.get_slice(name).get_shape()) for name in names)
        name = file.stem if place == "." else place
        counts[name] = counts.get(name, 0) + num
    return {name: num for name, num in counts.items() if num >= 1000}


def bibtex(paper: str) -> str:
    """The entry of a paper that is given as ``name, arXiv number``; empty for other texts."""
    found = re.search(r"arXiv (\d{2})(\d{2}\.\d{4,5})", paper)
    if found is None:
        return ""
    number = found[1] + found[2]
    known = read_yaml(_PAPERS).get(number) or {"title": paper.split(", arXiv")[0], "authors": []}
    fields = {
        "title": f"{{{known['title']}}}",
        "author": " and ".join(known["authors"]),
        "year": f"20{found[1]}",
        "eprint": number,
        "archivePrefix": "arXiv",
        "url": f"https://arxiv.org/abs/{number}",
    }
    lines = [f"  {name} = {{{value}}}," for name, value in fields.items() if value]
    return "\n".join([f"@misc{{arxiv:{number},", *lines, "}"])


def _telling(trained: Mapping[str, Any]) -> dict[str, float]:
    """The held-out metrics that tell how good a model is."""
    metrics: Mapping[str, float] = trained.get("metrics") or {}
    return {n: value for n, value in metrics.items() if not n.startswith(_OF_TRAINING)}


def _num_classes(config: Mapping[str, Any]) -> int:
    return int(config.get("num_classes", len(config.get("class_names") or [])))


def _is_embedded(trained: Mapping[str, Any]) -> bool:
    return str(trained.get("data")).startswith(_EMBEDDED)


def _limits(config: Mapping[str, Any]) -> list[str]:
    """What a reader may not expect, a sentence or two each."""
    trained = config.get("trained") or {}
    train = (trained.get("recipe") or {}).get("train") or {}
    steps, batch = trained.get("steps", train.get("steps")), train.get("batch_size")
    limits = []
    if steps and batch and steps * batch < _FEW_IMAGES:
        limits.append(
            f"A run of {steps:,} steps, which saw {steps * batch:,} images: a demonstration. Published models of "
            "these methods see tens of millions of images and more."
        )
    if _is_embedded(trained):
        limits.append("Its images were scenes drawn by semtok. It has never seen a photograph.")
    size = config.get("image_size") or trained.get("image_size")
    if size:
        shown = f"{size[0]}x{size[1]}"
        limits.append(
            f"It generates images of {shown} pixels, as it was trained."
            if config.get("kind") in _GENERATES
            else f"It was trained at {shown} pixels. Other sizes can be encoded, and were not measured."
        )
    if config.get("kind") in _GENERATES:
        limits.append(
            "Its images were not scored for this card. `semtok evaluate generation` measures them, against images "
            "that you choose."
        )
    return [*limits, "Nobody has examined it for bias, or for copies of training images."]


def _sampler(settings: Mapping[str, Any]) -> str | None:
    """Settings of a sampler, in words."""
    if not settings:
        return None
    guidance = settings.get("guidance") or {}
    scale = guidance.get("scale", 1.0)
    by_part = scale if isinstance(scale, dict) else {"": scale}
    words = [f"{value:g} {part}".strip() for part, value in by_part.items()]
    guided = any(value != 1 for value in by_part.values())
    steps = [] if settings["method"] == "dopri5" else [f"{settings['steps']} steps"]
    shown = f"guidance scale {', '.join(words)}" if guided else "no guidance"
    if guided and guidance.get("interval") not in (None, [0.0, 1.0], (0.0, 1.0)):
        shown += f" in the interval {guidance['interval']}"
    return ", ".join([settings["method"], *steps, shown])


def _rows(config: Mapping[str, Any], parameters: Mapping[str, int]) -> list[tuple[str, object]]:
    """Sizes, settings, and the figures that the held-out images gave."""
    trained = config.get("trained") or {}
    recipe = trained.get("recipe") or {}
    train, teacher = recipe.get("train") or {}, trained.get("teacher") or {}
    rows = [
        *((f"parameters of {name}", f"{num:,}") for name, num in parameters.items()),
        ("imported from", trained.get("imported_from")),
        ("data", trained.get("data")),
        ("teacher", teacher.get("name")),
        ("steps", trained.get("steps", train.get("steps"))),
        ("weights", trained.get("weights")),
        ("images per step", train.get("batch_size")),
        ("sampler", _sampler(config.get("sampler") or {})),
    ]
    rows += [
        (f"held-out {_LABELS.get(n, n)}", f"{value:.4g}") for n, value in _telling(trained).items()
    ]
    return [(name, value) for name, value in rows if value is not None]


def _data_type(data: str | None) -> str:
    """A word for the data: the Hub takes no spaces there."""
    return (data or "unknown").split(" ")[0]


def _base_models(trained: Mapping[str, Any]) -> list[str]:
    """Repositories on the Hub that the weights were started from or built on."""
    method = (trained.get("recipe") or {}).get("method") or {}
    references = (method.get("vae"), method.get("texture"))
    return [r for r in references if isinstance(r, str) and is_hub_id(r)]
