"""``evaluate generation``: how close generated images come to real ones."""

import argparse
import zipfile
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, get_args

from semtok.commands import evaluate_options as options
from semtok.commands.around_training import errors_at
from semtok.commands.generation_judges import (
    Sources,
    chosen_judges,
    labels_to_show,
    load_judges,
    measures,
    print_judges,
    seated,
)
from semtok.commands.sample_set import Drawing, protocol_of
from semtok.commands.sampler_options import (
    SAMPLER_OPTIONS,
    add_sampler_options,
    add_weak_option,
    load_weak,
    sampler_from,
    sped_up,
)
from semtok.commands.table import print_table
from semtok.diffusion.generator import Generator
from semtok.errors import UserError
from semtok.evaluation.classes import CLASS_SHARE
from semtok.evaluation.generation import (
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
    DRAWN_AT_ONCE,
    ImageSet,
    images_of_folder,
    images_of_generator,
    images_of_npz,
    images_of_source,
    labels_for,
    labels_of_set,
)
from semtok.evaluation.inception import check_torch_fidelity, load_inception
from semtok.evaluation.judges import WORDS, relative_scores, shares
from semtok.evaluation.protocol import (
    AS_STORED,
    ImagesProtocol,
    Protocol,
    data_protocol,
    drawn_protocol,
    file_digest,
    shown_names,
)
from semtok.images import Uint8Rule
from semtok.privacy import fit_to_show
from semtok.storage import cache_folder

_ABOUT = ("labels", "seed", "uint8", "sampler", "precision")
_DRAWING = ("num", "labels", "seed", "uint8", "weak", *SAMPLER_OPTIONS)


def add_task(tasks: argparse._SubParsersAction) -> None:
    """Adds the task to the command."""
    task = tasks.add_parser(
        "generation",
        description="Scores of a set of images. --model draws it here, in one process; to draw on several GPUs, run "
        "sample under accelerate launch, then --images on what it wrote.",
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
    add_weak_option(task)
    options.add_teacher_options(task, "whose features FD-<teacher> compares")
    task.add_argument(
        "--judge",
        nargs="+",
        action="append",
        default=[],
        metavar="WORD",
        help="one more network, which reads classes too; may be given several times, for FDr over them where the "
        f"reference is of data: {WORDS}",
    )
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
    choices = chosen_judges(args)
    networks = [teacher_network(options.load_teacher(args))]
    missing: dict[str, str] = {}
    try:
        networks.insert(
            0, inception_network(load_inception(download=args.download).to(options.device()))
        )
    except UserError as error:
        missing["Inception's scores (FID, sFID, IS, precision, recall, KID)"] = str(error)
    drawn = _generated(args)
    reference = _reference(args, drawn)
    judges = load_judges(choices, networks, reference.sources)
    networks += [j.network for j in judges if j.network not in networks]

    references = _references(networks, reference, missing)
    if args.save_reference is not None:
        write_statistics(args.save_reference, next(iter(references.values())))
    networks = [network for network in networks if network.name in references]
    generated = drawn.images
    judges = [judge for judge in judges if judge.network.name in references]
    with errors_at("--reference"):
        seats = seated(judges, references, reference.sources, generated.num_images)
    labels = labels_to_show(seats, drawn.labels, drawn.class_names, reference.sources, missing)
    with errors_at(args.model or "--images"):
        seen = see(generated, networks)
    with errors_at("--reference"):
        scores = {
            name: generation_scores(seen[name], features) for name, features in references.items()
        }
        for seat in seats:
            scores[seat.name] |= shares(seen[seat.name], seat, labels)
        flat = {name: value for own in scores.values() for name, value in own.items()}
        relative = relative_scores(flat, seats)
    told = Protocol(
        "generation",
        measures(seats, generated.num_images),
        {network.name: network.protocol for network in networks if network.protocol},
        drawn.models,
        replace(drawn.protocol, digest=next(iter(seen.values())).digest),
        references={name: reference.of(features) for name, features in references.items()},
    )
    _print(args, scores, relative, told, references)
    print_judges(seats)
    for name, reason in missing.items():
        print(f"{name}: missing; {reason}")
    return {
        "protocol": told.to_json(),
        **drawn.about,
        "num_images": generated.num_images,
        "references": {name: features.sources for name, features in references.items()},
        "unavailable": options.without_places(missing),
        "judges": {seat.name: seat.told() for seat in seats},
        "scores": flat | relative,
    }


def _print(
    args: argparse.Namespace,
    scores: dict[str, dict[str, float]],
    relative: dict[str, float],
    told: Protocol,
    references: dict[str, SetFeatures],
) -> None:
    """The scores, each with what it compares with."""
    shown = told.to_json()
    rows = []
    for network, own in scores.items():
        name = shown["references"][network]["name"]
        for score, value in own.items():
            alone = score == "IS" or score.startswith(CLASS_SHARE)
            against = "" if alone else f"against {name}"
            if score.startswith(("precision", "recall", "K")):
                against = f"against {references[network].features_source or name}"
            rows.append((score, f"{value:<8.4g}", against))
    rows += [
        (score, f"{value:<8.4g}", "FD by that of held-out images")
        for score, value in relative.items()
    ]
    number = told.images.num_images
    note = "" if number == PUBLISHED_NUM_IMAGES else "; published scores use 50,000"
    print_table(f"{number} images of {shown['images']['name']}{note}", rows)
    print("\n".join(told.lines()))
    if args.save_reference is not None:
        print(f"statistics of the reference, by {next(iter(references))}: {args.save_reference}")


def _check_options(args: argparse.Namespace) -> None:
    """Refuses what can't be, and what would have no effect."""
    drawing = {key: getattr(args, key) for key in _DRAWING}
    without_effect = [key for key, value in drawing.items() if value is not None]
    if args.images is not None and without_effect:
        raise UserError(
            f"--{without_effect[0].replace('_', '-')}: goes with --model; --images are drawn already"
        )
    args.num = 2000 if args.num is None else args.num
    args.seed = 0 if args.seed is None else args.seed
    args.labels = args.labels or "balanced"
    args.uint8 = args.uint8 or "round"
    if min(args.num, args.num_reference) < 2:
        raise UserError("--num and --num-reference must be at least 2")
    if args.save_reference is not None and args.save_reference.suffix != ".npz":
        raise UserError(f"--save-reference {args.save_reference}: expected FILE.npz")


@dataclass(frozen=True)
class _Drawn:
    """Images to score.

    Attributes:
        protocol: what to record of them, but for their digest.
        about: the same in few keys, as files of scores have always had it.
        labels: that they were asked to show; None: nobody says, or of one class.
        class_names: of these; empty: not known.
        models: digests of what drew them, by name.
        trained_on: data settings of the model; None where the images were drawn before.
    """

    images: ImageSet
    protocol: ImagesProtocol
    about: dict[str, Any]
    labels: list[int] | None = None
    class_names: tuple[str, ...] = ()
    models: dict[str, str] = field(default_factory=dict)
    trained_on: dict[str, Any] | None = None


def _generated(args: argparse.Namespace) -> _Drawn:
    if args.images is not None:
        return _drawn_before(args.images, with_labels=bool(args.judge))
    generator = sped_up(Generator.from_pretrained(args.model).to(options.device()), args)
    sampler = sampler_from(args, generator)
    weak = load_weak(args, generator, sampler)
    weak = sped_up(weak.to(options.device()), args) if weak is not None else None
    with errors_at("--weak" if weak is not None else "--guidance"):
        generator.check_sampling(sampler, weak)
    labels = labels_for(
        args.num,
        max(1, generator.network.num_classes),
        balanced=args.labels == "balanced",
        seed=args.seed,
    )
    drawing = Drawing(generator, weak, sampler, labels, args.seed, DRAWN_AT_ONCE, uint8=args.uint8)
    written = protocol_of(drawing, args, labels=args.labels)
    name = str(fit_to_show(args.model))
    protocol = drawn_protocol(name, "model", args.num, written)
    names = shown_names(filter(None, (args.model, args.weak)))
    models = {names[args.model]: written["model"]["digest"]}
    if weak is not None:
        models[names[args.weak]] = written["weak"]["digest"]
    images = images_of_generator(
        generator, labels, seed=args.seed, sampler=sampler, weak=weak, uint8=args.uint8
    )
    about = {"images": name} | {key: written[key] for key in _ABOUT}
    trained_on = options.data_trained_on(args.model, generator)
    shown = labels if len(generator.class_names) > 1 else None
    return _Drawn(images, protocol, about, shown, generator.class_names, models, trained_on)


def _drawn_before(path: Path, *, with_labels: bool) -> _Drawn:
    kind = "archive" if _is_archive(path) else "folder"
    if kind == "folder" and not path.is_dir():
        raise UserError(f"--images {path}: no such folder or .npz file")
    images = images_of_npz(path) if kind == "archive" else images_of_folder(path)
    if images.num_images < 2:
        raise UserError(f"--images {path}: one image; scores are of sets")
    name = str(fit_to_show(str(path)))
    protocol = drawn_protocol(name, kind, images.num_images, images.protocol)
    labels = labels_of_set(path, images) if with_labels else None
    return _Drawn(images, protocol, {"images": name}, labels)


@dataclass(frozen=True)
class _Reference:
    """What images are compared with: statistics that a file holds, and real images; at least one of the two.

    Attributes:
        images_protocol, stored_protocol: what to record of each.
        sources: training and held-out images of the data; None: it is files.
    """

    images: ImageSet | None = None
    images_protocol: ImagesProtocol | None = None
    stored: SetFeatures | None = None
    stored_protocol: ImagesProtocol | None = None
    sources: Sources | None = None

    def of(self, features: SetFeatures) -> ImagesProtocol:
        """What to record of the moments that ``features`` holds."""
        if self.stored is not None and features.pooled is self.stored.pooled:
            assert self.stored_protocol is not None
            return self.stored_protocol
        assert self.images_protocol is not None
        return replace(self.images_protocol, digest=features.digest)


def _reference(args: argparse.Namespace, drawn: _Drawn) -> _Reference:
    words = args.reference
    if words is not None and len(words) == 1 and "=" not in words[0]:
        return _reference_of_files(Path(words[0]), drawn.images)
    if words is None and drawn.trained_on is None:
        raise UserError("--reference is missing; give a folder, an .npz, or data settings")
    sources = options.data_of(words, drawn.trained_on, place="--reference")
    train, _ = sources
    real = images_of_source(train, args.num_reference)
    _check_size(real, drawn.images, train.name)
    name = f"{real.num_images} of {train.name}"
    if words is None:
        name = f"the model's own training images, {name}"
    told = data_protocol(train, real.num_images, None, name=name)
    return _Reference(real, told, sources=sources)


def _reference_of_files(path: Path, generated: ImageSet) -> _Reference:
    name = str(fit_to_show(str(path)))
    if path.is_dir():
        images = images_of_folder(path, generated.image_size)
        told = ImagesProtocol(name, "folder", images.num_images, crop="adm", uint8="round")
        return _Reference(images, told)
    if not _is_archive(path):
        raise UserError(f"--reference {path}: no such folder or .npz file")
    with zipfile.ZipFile(path) as archive:
        members = archive.namelist()
    stored = read_statistics(path) if "mu.npy" in members else None
    images = images_of_npz(path) if "arr_0.npy" in members else None
    if stored is None and images is None:
        raise UserError(f"--reference {path}: holds neither images (arr_0) nor statistics (mu)")
    _check_size(images, generated, path)
    of_images = of_stored = None
    if images is not None:
        of_images = ImagesProtocol(
            name, "archive", images.num_images, crop=AS_STORED, uint8=AS_STORED
        )
    if stored is not None:
        whose = "" if stored.source == path.name else f" of {stored.source}"
        told = f"statistics{whose} in {name}"
        number = stored.num_images or None
        of_stored = ImagesProtocol(told, "statistics", number, digest=file_digest(path))
    return _Reference(images, of_images, stored, of_stored)


def _check_size(images: ImageSet | None, generated: ImageSet, place: object) -> None:
    if images is not None and images.image_size != generated.image_size:
        (h, w), (height, width) = images.image_size, generated.image_size
        raise UserError(f"--reference {place}: images of {h}x{w}, those to score {height}x{width}")


def _is_archive(path: Path) -> bool:
    return path.is_file() and zipfile.is_zipfile(path)


def _references(
    networks: list[FeatureNetwork], reference: _Reference, missing: dict[str, str]
) -> dict[str, SetFeatures]:
    """What each network sees of the reference; notes those that see nothing of it.

    Raises:
        UserError: there is none that does.
    """
    references: dict[str, SetFeatures] = {}
    for network in networks:
        features = _reference_features(network, reference)
        if features is None:
            missing[f"FD-{network.name}"] = "the reference's file is of another network"
        else:
            references[network.name] = features
    if not references:
        raise UserError("--reference: nothing there that can be compared with; give images")
    return references


def _reference_features(network: FeatureNetwork, reference: _Reference) -> SetFeatures | None:
    """What a network sees of the reference; a file's statistics go before its images, as in ADM's evaluation."""
    seen, stored = None, reference.stored
    if reference.images is not None:
        seen = see_reference(reference.images, network, cache_folder("references"))
    if stored is None or stored.network != network.name:
        return seen
    return stored if seen is None else stored.with_features_of(seen)
