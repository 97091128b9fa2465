"""How close generated images come to real ones.

In the Inception network's features: FID (Heusel et al. 2017), sFID (Nash et al. 2021), Inception Score
(Salimans et al. 2016), precision and recall (Kynkäänniemi et al. 2019) and KID (Bińkowski et al. 2018), with the
choices of ADM's evaluation (Dhariwal and Nichol 2021): 3 neighbours, references of 10,000 images for precision and
recall, splits of 5,000 for the Inception Score, but shuffled, as the order of a set should not matter. In a
teacher's features: the same distances under the teacher's name, as FD-DINOv2 (Stein et al. 2023).
"""

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from pydantic import ConfigDict
from torch import Tensor

from semtok.errors import UserError
from semtok.evaluation.frechet import Gaussian, frechet_distance
from semtok.evaluation.image_sets import ImageSet
from semtok.evaluation.inception import Inception, check_torch_fidelity
from semtok.evaluation.protocol import Network, PixelDigest, teacher_protocol
from semtok.images import to_pixels
from semtok.lock import made_once
from semtok.progress import progress, waiting
from semtok.settings import Config, parse
from semtok.statistics import StreamingMoments
from semtok.storage import DAMAGE, as_damage, first_line, new_file
from semtok.teachers import Teacher

PUBLISHED_NUM_IMAGES = 50_000
MAX_REFERENCE_FEATURES = 10_000
_SPLIT = 5_000
_SUBSETS, _SUBSET_SIZE = 100, 1_000
_NEIGHBOURS = 3
MEASURES = (
    "Fréchet distances of unbiased moments in float64; by torch-fidelity: precision and recall of the "
    f"{_NEIGHBOURS}-nearest-neighbour balls against at most {MAX_REFERENCE_FEATURES} references, kernel distance "
    f"(cubic kernel) over {_SUBSETS} subsets of {_SUBSET_SIZE} or as many as there are, Inception Score over shuffled "
    f"splits of {_SPLIT} (one split of fewer than {2 * _SPLIT}); images of 8 bits"
)


@dataclass(frozen=True)
class FeatureNetwork:
    """A network to see images by.

    Attributes:
        name: ``inception``, or the teacher's.
        identity: of its weights, for caches.
        see: uint8 images (B, 3, H, W) to features: ``pooled`` (B, D), and of Inception ``spatial`` and
            ``logits`` too.
        protocol: what to record of it.
    """

    name: str
    identity: str
    see: Callable[[Tensor], dict[str, Tensor]]
    protocol: Network | None = None


def inception_network(inception: Inception) -> FeatureNetwork:
    """Inception as a feature network."""
    device = next(inception.parameters()).device
    return FeatureNetwork(
        "inception", "2015-12-05", lambda x: vars(inception(x.to(device))), inception.protocol
    )


def teacher_network(teacher: Teacher) -> FeatureNetwork:
    """A teacher as a feature network: its pooled token."""
    device = teacher.mean.device

    def see(images: Tensor) -> dict[str, Tensor]:
        return {"pooled": teacher.features(to_pixels(images, device=device)).pooled.float()}

    # The weights' digest tells how images are prepared.
    settings = teacher.config.model_dump_json(include={"name", "input_size", "layers"})
    identity = f"{settings} {teacher.fingerprint()}"
    return FeatureNetwork(teacher.config.name, identity, see, teacher_protocol(teacher))


@dataclass(frozen=True)
class SetFeatures:
    """What a network saw in a set of images, without the images.

    Attributes:
        network: which one, by name.
        identity: of its weights and settings; None where a file does not say.
        image_size: (height, width) of the images; None where a file does not say.
        source: whose images, in a few words.
        num_images: how many the moments are of.
        pooled, spatial: their Gaussians; ``spatial`` of Inception alone.
        features: float32 (M, D), of all images or of a fixed random choice; None where a file of
            statistics has none.
        logits: float32 (N, 1008) of Inception, where the Inception Score is wanted.
        digest: of the images' pixels, see ``PixelDigest``; None where a file does not say.
        features_source: whose features they are, where not those of the moments' images.
    """

    network: str
    identity: str | None
    source: str
    image_size: tuple[int, int] | None
    num_images: int
    pooled: Gaussian
    spatial: Gaussian | None = None
    features: Tensor | None = None
    logits: Tensor | None = None
    digest: str | None = None
    features_source: str | None = None

    def with_features_of(self, images: "SetFeatures") -> "SetFeatures":
        """These statistics with the features of images that lie beside them, as in ADM's references."""
        if self.features is not None:
            return self
        return replace(self, features=images.features, features_source=images.source)

    @property
    def sources(self) -> str:
        """Whose moments and features they are, in a sentence."""
        if self.features_source is None:
            return self.source
        return f"statistics of {self.source}; precision, recall and KID by {self.features_source}"


def see(
    images: ImageSet,
    networks: Sequence[FeatureNetwork],
    *,
    max_features: int | None = None,
) -> dict[str, SetFeatures]:
    """One pass over a set for all networks, by whose names the result is; holds no more images than a batch.

    Args:
        max_features: keep the features of a random choice of so many images; None: of all.

    Raises:
        ValueError: fewer than two images, or features that are not finite.
    """
    is_kept = features_kept(images.num_images, max_features)
    collectors = [_Collector(network) for network in networks]
    digest, first = PixelDigest(), 0
    with progress(f"features ({images.name})", images.num_images) as advance:
        for batch in digest.watch(images.open()):
            for collector in collectors:
                collector.add(batch, is_kept[first : first + len(batch)])
            first += len(batch)
            advance(len(batch))
    return {c.network.name: replace(c.result(images), digest=str(digest)) for c in collectors}


def features_kept(num_images: int, max_features: int | None) -> Tensor:
    """Of which images of a set ``see`` keeps the features: bool (num_images,)."""
    order = torch.randperm(num_images, generator=torch.Generator().manual_seed(0))
    is_kept = torch.zeros(num_images, dtype=torch.bool)
    is_kept[order[:max_features]] = True
    return is_kept


class _Collector:
    """Takes in what one network sees, batch by batch."""

    def __init__(self, network: FeatureNetwork) -> None:
        self.network = network
        self.pooled = StreamingMoments(covariance=True)
        self.spatial = StreamingMoments(covariance=True)
        self.features: list[Tensor] = []
        self.logits: list[Tensor] = []

    def add(self, images: Tensor, is_kept: Tensor) -> None:
        seen = self.network.see(images)
        if not seen["pooled"].isfinite().all():
            raise ValueError(f"{self.network.name}: features of an image are not finite")
        self.pooled.add(seen["pooled"])
        self.features.append(seen["pooled"].cpu()[is_kept])
        if "spatial" in seen:
            self.spatial.add(seen["spatial"])
            self.logits.append(seen["logits"].cpu())

    def result(self, images: ImageSet) -> SetFeatures:
        return SetFeatures(
            self.network.name,
            self.network.identity,
            images.name,
            images.image_size,
            self.pooled.count,
            Gaussian.of(self.pooled),
            Gaussian.of(self.spatial) if self.spatial.count else None,
            torch.cat(self.features),
            torch.cat(self.logits) if self.logits else None,
        )


def see_reference(images: ImageSet, network: FeatureNetwork, cache: Path) -> SetFeatures:
    """As ``see``, for the real images: at most 10,000 features, and read from the cache where they are. Where another
    process sees the same, this one waits for that.

    Args:
        cache: a folder; a file in it is of one set of images and one network.
    """
    key = f"{images.identity} {network.name} {network.identity} {MAX_REFERENCE_FEATURES}"
    file = cache / f"{hashlib.blake2b(key.encode(), digest_size=12).hexdigest()}.npz"

    def make() -> SetFeatures:
        seen = see(images, [network], max_features=MAX_REFERENCE_FEATURES)[network.name]
        kept = replace(seen, logits=None)
        write_statistics(file, kept)
        return kept

    what = "a command that sees these images by this network"
    return made_once(file, what, read=_kept, make=make)


def _kept(file: Path) -> SetFeatures | None:
    """What a cache's file holds; None: nothing of use."""
    stored = read_statistics(file)
    return stored if stored.digest is not None else None  # of an older version, which did not tell


# Files of statistics ------------------------------------------------------------------------------


def write_statistics(path: Path, seen: SetFeatures) -> None:
    """Writes an ``.npz`` with the keys of ADM's files of statistics (``mu``, ``sigma``, and ``mu_s``,
    ``sigma_s`` for sFID), the features, and whose they are."""
    arrays = {"mu": seen.pooled.mean, "sigma": seen.pooled.covariance}
    if seen.spatial is not None:
        arrays |= {"mu_s": seen.spatial.mean, "sigma_s": seen.spatial.covariance}
    if seen.features is not None:
        arrays["features"] = seen.features
    about = json.dumps({name: getattr(seen, name) for name in _About.model_fields})
    with new_file(path) as temporary:
        np.savez(temporary, about=about, **{k: v.cpu().numpy() for k, v in arrays.items()})


def read_statistics(path: Path) -> SetFeatures:
    """Reads a file of statistics, ours or ADM's, which are of Inception.

    Raises:
        UserError: no such file, damaged, or without ``mu`` and ``sigma`` that fit each other.
    """
    try:
        with as_damage(), np.load(path, allow_pickle=False) as file:
            tensors = {k: torch.from_numpy(file[k]) for k in file.files if k in _STATISTICS_KEYS}
            about = json.loads(str(file["about"])) if "about" in file.files else {}
    except FileNotFoundError:
        raise UserError(f"{path}: no such file") from None
    except DAMAGE as error:
        raise UserError(f"{path}: no sound file of statistics ({first_line(error)})") from None
    told = parse(_About, about, f"{path}: about")
    try:
        gaussian = _gaussian(tensors, "mu", "sigma")
        spatial = _gaussian(tensors, "mu_s", "sigma_s") if "mu_s" in tensors else None
    except ValueError as error:
        raise UserError(f"{path}: no sound file of statistics ({first_line(error)})") from None
    return SetFeatures(
        told.network,
        told.identity,
        told.source or path.name,
        told.image_size,
        told.num_images,
        gaussian,
        spatial,
        tensors.get("features"),
        digest=told.digest,
        features_source=told.features_source,
    )


class _About(Config):
    """What a file of ours says of its statistics."""

    model_config = ConfigDict(extra="ignore")

    network: str = "inception"
    identity: str | None = None
    source: str | None = None
    image_size: tuple[int, int] | None = None
    num_images: int = 0
    digest: str | None = None
    features_source: str | None = None


def _gaussian(tensors: Mapping[str, Tensor], mean_key: str, covariance_key: str) -> Gaussian:
    if not {mean_key, covariance_key} <= tensors.keys():
        raise ValueError(f"without {mean_key} and {covariance_key}")
    mean, covariance = tensors[mean_key], tensors[covariance_key]
    if mean.ndim != 1 or covariance.shape != (len(mean), len(mean)):
        raise ValueError("mean and covariance do not fit each other")
    if not (mean.isfinite().all() and covariance.isfinite().all()):
        raise ValueError("not finite")
    return Gaussian(mean.double(), covariance.double())


_STATISTICS_KEYS = {"mu", "sigma", "mu_s", "sigma_s", "features"}


# Scores -------------------------------------------------------------------------------------------


@waiting("computing distances between sets of features")
def generation_scores(generated: SetFeatures, reference: SetFeatures) -> dict[str, float]:
    """All scores that the features of the two sets allow, by ``MEASURES``.

    Returns:
        For ``inception`` FID, sFID, IS, precision, recall, KID; for a teacher FD, precision, recall and KD
        with the teacher's name.

    Raises:
        UserError: torch-fidelity is not installed.
        ValueError: the reference is of another network, or of images of another size.
    """
    check_torch_fidelity()
    from torch_fidelity.metric_isc import isc_features_to_metric
    from torch_fidelity.metric_kid import kid_features_to_metric
    from torch_fidelity.metric_prc import prc_features_to_metric

    network = generated.network
    if reference.network != network:
        raise ValueError(f"features of {network}, but a reference of {reference.network}")
    if reference.identity not in (None, generated.identity):
        raise ValueError(f"the reference is of another '{network}': other weights or settings")
    if reference.image_size not in (None, generated.image_size):
        raise ValueError(f"the reference is of images of another size, {reference.image_size}")
    is_inception = network == "inception"
    end = "" if is_inception else f"-{network}"
    scores = {
        "FID" if is_inception else f"FD{end}": frechet_distance(generated.pooled, reference.pooled)
    }
    if generated.spatial is not None and reference.spatial is not None:
        scores["sFID"] = frechet_distance(generated.spatial, reference.spatial)
    if generated.logits is not None:
        splits = max(1, len(generated.logits) // _SPLIT)
        scores["IS"] = isc_features_to_metric(generated.logits, splits=splits)[
            "inception_score_mean"
        ]
    ours, real = generated.features, reference.features
    if ours is None or real is None or min(len(ours), len(real)) <= _NEIGHBOURS:
        return scores
    balls = prc_features_to_metric(
        ours,
        real,
        prc_neighborhood=_NEIGHBOURS,
        prc_batch_size=MAX_REFERENCE_FEATURES,
        save_cpu_ram=True,
        verbose=False,
    )
    size = min(_SUBSET_SIZE, len(ours), len(real))
    # Subsets that are the whole set are all the same.
    subsets = 1 if size == len(ours) == len(real) else _SUBSETS
    kernel = kid_features_to_metric(
        ours, real, kid_subsets=subsets, kid_subset_size=size, verbose=False
    )
    return scores | {
        f"precision{end}": balls["precision"],
        f"recall{end}": balls["recall"],
        "KID" if is_inception else f"KD{end}": kernel["kernel_inception_distance_mean"],
    }
