"""``evaluate generation``: how close generated images come to real ones."""

import argparse
import zipfile
from pathlib import Path
from typing import Any, get_args

from tqdm import tqdm

from semtok.commands import evaluate_options as options
from semtok.commands.around_training import errors_at
from semtok.commands.sampler_options import add_sampler_options, sampler_from, sped_up
from semtok.commands.table import print_table
from semtok.diffusion.diffusion_config import check_guidance
from semtok.diffusion.generator import Generator
from semtok.errors import UserError
from semtok.evaluation.generation import (
    PROTOCOL,
    PUBLISHED_NUM_IMAGES,
    FeatureNetwork,
    SetFeatures,
    generation_scores,
    inception_network,
    read_statistics,
    see,
    see_reference,
    teacher_network,
    write_statistics,
)
from semtok.evaluation.image_sets import (
    ImageSet,
    images_of_folder,
    images_of_generator,
    images_of_npz,
    images_of_source,
    labels_for,
)
from semtok.evaluation.inception import check_torch_fidelity, load_inception
from semtok.images import Uint8Rule
from semtok.storage import cache_folder

_DRAWING = (
    *("num", "labels", "seed", "uint8", "method", "steps"),
    *("guidance", "interval", "precision", "compile"),
)


def add_task(tasks: argparse._SubParsersAction) -> None:
    """Adds the task to the command."""
    task = tasks.add_parser(
        "generation",
        help="FID, sFID, IS, precision, recall, KID, and Fréchet distance in a teacher's features",
    )
    what = task.add_mutually_exclusive_group(required=True)
    what.add_argument("--model", metavar="REF", help="folder, run or Hub id of a generator")
    what.add_argument(
        "--images", type=Path, metavar="DIR|NPZ", help="images drawn before, by any model"
    )
    task.add_argument(
        "--reference",
        nargs="+",
        metavar="DIR|NPZ|key=value",
        help="real images: a folder, an archive of ADM's (of images, of statistics, or both), or data "
        "settings; default: the training images of the model's own data",
    )
    task.add_argument("--num", type=int, help="images to draw from the model; default: 2000")
    task.add_argument(
        "--num-reference", type=int, default=50_000, help="at most so many real images of data"
    )
    task.add_argument(
        "--labels",
        choices=("balanced", "random"),
        help="each class equally often (the default), or drawn at random; published scores differ by it",
    )
    task.add_argument("--seed", type=int, help="of the images; default: 0")
    task.add_argument(
        "--uint8",
        choices=get_args(Uint8Rule),
        help="how images become uint8: rounded (the default), or truncated as REPA does",
    )
    add_sampler_options(task)
    options.add_teacher_options(task, "whose features FD-<teacher> compares")
    task.add_argument(
        "--download", action="store_true", help="fetch Inception's weights if not cached"
    )
    task.add_argument(
        "--save-reference",
        type=Path,
        metavar="FILE.npz",
        help="write the reference's statistics, in ADM's keys",
    )
    options.add_output_options(task)
    task.set_defaults(command=_generation)


def _generation(args: argparse.Namespace) -> dict[str, Any]:
    check_torch_fidelity()
    _check_options(args)
    options.check_output(args)
    teacher = options.load_teacher(args)
    networks = [teacher_network(teacher)]
    missing: dict[str, str] = {}
    try:
        networks.insert(
            0, inception_network(load_inception(download=args.download).to(options.device()))
        )
    except UserError as error:
        missing["Inception's scores (FID, sFID, IS, precision, recall, KID)"] = str(error)
    generated, about, trained_on = _generated(args)
    stored, real = _reference(args, generated, trained_on)

    references: dict[str, SetFeatures] = {}
    for network in networks:
        reference = _reference_features(network, stored, real)
        if reference is None:
            missing[f"FD-{network.name}"] = "the reference's file is of another network"
        else:
            references[network.name] = reference
    if not references:
        raise UserError("--reference: nothing there that can be compared with; give images")
    if args.save_reference is not None:
        write_statistics(args.save_reference, next(iter(references.values())))
    with (
        errors_at(args.model or "--images"),
        tqdm(total=generated.num_images, desc="images", unit="image", disable=None) as progress,
    ):
        used = [network for network in networks if network.name in references]
        seen = see(generated, used, progress=progress.update)
    with errors_at("--reference"):
        scores = {
            score: value
            for name, reference in references.items()
            for score, value in generation_scores(seen[name], reference).items()
        }

    sources = {name: r.source for name, r in references.items()}
    note = "" if generated.num_images == PUBLISHED_NUM_IMAGES else "; published scores use 50,000"
    rows = [(name, f"{value:.4g}") for name, value in scores.items()]
    print_table(f"{generated.num_images} images of {about['images']}{note}", rows)
    for name, source in sources.items():
        print(f"reference, seen by {name}: {source}")
    for name, reason in missing.items():
        print(f"{name}: missing; {reason}")
    if args.save_reference is not None:
        print(f"statistics of the reference, by {next(iter(references))}: {args.save_reference}")
    return {
        "protocol": PROTOCOL,
        **about,
        "num_images": generated.num_images,
        "references": sources,
        "unavailable": missing,
        "scores": scores,
    }


def _check_options(args: argparse.Namespace) -> None:
    """Refuses what can't be, and what would have no effect."""
    drawing = {key: getattr(args, key) for key in _DRAWING}
    without_effect = [key for key, value in drawing.items() if value is not None]
    if args.images is not None and without_effect:
        raise UserError(f"--{without_effect[0]}: goes with --model; --images are drawn already")
    args.num = 2000 if args.num is None else args.num
    args.seed = 0 if args.seed is None else args.seed
    args.labels = args.labels or "balanced"
    args.uint8 = args.uint8 or "round"
    if min(args.num, args.num_reference) < 2:
        raise UserError("--num and --num-reference must be at least 2")
    if args.save_reference is not None and args.save_reference.suffix != ".npz":
        raise UserError(f"--save-reference {args.save_reference}: expected FILE.npz")


def _generated(
    args: argparse.Namespace,
) -> tuple[ImageSet, dict[str, Any], dict[str, Any] | None]:
    """The images to score, what to record of them, and what their model was trained on."""
    if args.images is not None:
        images = images_of_npz(args.images) if _is_archive(args.images) else None
        if images is None:
            if not args.images.is_dir():
                raise UserError(f"--images {args.images}: no such folder or .npz file")
            images = images_of_folder(args.images)
        if images.num_images < 2:
            raise UserError(f"--images {args.images}: one image; scores are of sets")
        return images, {"images": str(args.images)}, None
    generator = sped_up(Generator.from_pretrained(args.model).to(options.device()), args)
    sampler = sampler_from(args, generator)
    with errors_at("--guidance"):
        check_guidance(generator.config, sampler, generator.network.spec)
    labels = labels_for(
        args.num,
        max(1, generator.network.num_classes),
        balanced=args.labels == "balanced",
        seed=args.seed,
    )
    about = {
        "images": args.model,
        "labels": args.labels,
        "seed": args.seed,
        "uint8": args.uint8,
        "sampler": sampler.model_dump(mode="json"),
        "precision": args.precision or "fp32",
    }
    images = images_of_generator(
        generator, labels, seed=args.seed, sampler=sampler, uint8=args.uint8
    )
    return images, about, options.data_trained_on(args.model, generator)


def _reference(
    args: argparse.Namespace, generated: ImageSet, trained_on: dict[str, Any] | None
) -> tuple[SetFeatures | None, ImageSet | None]:
    """Statistics that a file holds, and real images; at least one of the two."""
    words = args.reference
    if words is not None and len(words) == 1 and "=" not in words[0]:
        path = Path(words[0])
        if path.is_dir():
            return None, images_of_folder(path, generated.image_size)
        if not _is_archive(path):
            raise UserError(f"--reference {path}: no such folder or .npz file")
        with zipfile.ZipFile(path) as archive:
            names = archive.namelist()
        stored = read_statistics(path) if "mu.npy" in names else None
        images = images_of_npz(path) if "arr_0.npy" in names else None
        if stored is None and images is None:
            raise UserError(f"--reference {path}: holds neither images (arr_0) nor statistics (mu)")
        _check_size(images, generated, path)
        return stored, images
    if words is None and trained_on is None:
        raise UserError("--reference is missing; give a folder, an .npz, or data settings")
    train, _ = options.data_of(words, trained_on, place="--reference")
    real = images_of_source(train, args.num_reference)
    _check_size(real, generated, train.name)
    return None, real


def _check_size(images: ImageSet | None, generated: ImageSet, place: object) -> None:
    if images is not None and images.image_size != generated.image_size:
        (h, w), (height, width) = images.image_size, generated.image_size
        raise UserError(f"--reference {place}: images of {h}x{w}, those to score {height}x{width}")


def _is_archive(path: Path) -> bool:
    return path.is_file() and zipfile.is_zipfile(path)


def _reference_features(
    network: FeatureNetwork, stored: SetFeatures | None, real: ImageSet | None
) -> SetFeatures | None:
    """What a network sees of the reference; a file's statistics go before its images, as in ADM's evaluation."""
    seen = see_reference(real, network, cache_folder("references")) if real is not None else None
    if stored is None or stored.network != network.name:
        return seen
    return stored if seen is None else stored.with_features_of(seen)
