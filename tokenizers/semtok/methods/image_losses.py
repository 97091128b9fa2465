"""What every method that learns to decode images minimises: distances between images, and the adversarial part."""

from collections.abc import Callable, Mapping
from typing import Any, Literal

from pydantic import Field
from torch import Tensor, nn

from semtok.methods.adversarial import AdversarialConfig, DiscriminatorLearner, generator_term
from semtok.objective import Inputs, MethodContext, Term, TokenizerObjective, Unregistered
from semtok.optimiser import OptimiserConfig
from semtok.perceptual import LPIPS, check_lpips_size, teacher_distance
from semtok.registry import MethodConfig
from semtok.sampler.draws import Draws
from semtok.settings import check_used

# Settings ----------------------------------------------------------------------------------------


class ImageLossConfig(MethodConfig):
    """Settings of the losses on images. Weights are per mean over pixels."""

    reconstruction: Literal["l1", "mse"] = "l1"
    """Distance between pixels in [-1, 1]: absolute or squared error."""
    reconstruction_weight: float = Field(1.0, ge=0)
    """Weight of that distance."""
    perceptual: Literal["lpips", "teacher", "none"] = "none"
    """Distance between images besides pixels: LPIPS, the teacher's features, or none."""
    perceptual_weight: float = Field(1.0, ge=0)
    """Weight of that distance."""
    lpips_net: Literal["vgg", "alex", "squeeze"] = "vgg"
    """Network of LPIPS."""
    adversarial: AdversarialConfig | None = None
    """A discriminator; None: there is none."""

    def needs_teacher(self) -> bool:
        return self.perceptual == "teacher"

    @property
    def compares_images(self) -> bool:
        """Whether a distance between images has a weight: what adaptive weights adapt to."""
        return bool(
            self.reconstruction_weight or (self.perceptual != "none" and self.perceptual_weight)
        )

    def check_use(self, image_size: tuple[int, int]) -> None:
        adversarial, perceptual = self.adversarial, f"method.perceptual={self.perceptual}"
        if not self.compares_images and (adversarial is None or adversarial.adaptive):
            way_out = "it more, or pass another method.perceptual"
            if self.perceptual != "none":
                way_out = "it or method.perceptual_weight more"
            raise ValueError(
                f"method.reconstruction_weight: 0 with {perceptual} compares no images, to which adversarial weights "
                f"adapt too; give {way_out}"
            )
        if adversarial is not None:
            adversarial.check_use(image_size)
        if self.perceptual == "none":
            check_used(self, "method", perceptual, "perceptual_weight")
        if self.perceptual != "lpips":
            check_used(self, "method", perceptual, "lpips_net")


# The losses --------------------------------------------------------------------------------------


def reconstruction_loss(
    reconstruction: Tensor, pixels: Tensor, kind: Literal["l1", "mse"]
) -> Tensor:
    """Mean absolute or squared difference over pixels, (B,)."""
    difference = reconstruction.float() - pixels.float()
    return (difference.abs() if kind == "l1" else difference.square()).mean(dim=(1, 2, 3))


class ImageLossLearner(nn.Module):
    """Trains a decoder, alone or with what comes before it; subclasses bring the networks and ``forward``."""

    def __init__(
        self, config: ImageLossConfig, context: MethodContext, discriminator: nn.Module | None
    ) -> None:
        super().__init__()
        self.config = config
        lpips = LPIPS(config.lpips_net) if config.perceptual == "lpips" else None
        self._lpips, self._teacher = Unregistered(lpips), Unregistered(context.teacher)
        self._discriminator = Unregistered(discriminator)

    @property
    def last_layer(self) -> Tensor:
        """The weight at which the adversarial part's weight is adapted."""
        raise NotImplementedError

    def fresh_reconstruction(self, inputs: Inputs) -> Tensor:
        """What the images (B, 3, H, W) are decoded to in use: without noise, in eval mode, by the present weights."""
        raise NotImplementedError

    def smallest(self, image_size: tuple[int, int]) -> tuple[int, int]:
        """(height, width) of the smallest images that are compared.

        Raises:
            ValueError: images of this size can't be compared as the settings say.
        """
        return image_size

    def target(self, pixels: Tensor, draws: Draws) -> Tensor:
        """What the reconstructions of these images are held against, (B, 3, H', W')."""
        return pixels

    def image_terms(
        self, x_hat: Tensor, inputs: Inputs, target: Tensor | None = None
    ) -> dict[str, Term]:
        """λ_r L_rec(x, x̂) + λ_p d(x, x̂), with L_rec the mean absolute or squared error, and d LPIPS or a distance in
        the teacher's features.

        Args:
            target: x; None: the images. Weights fall with its share of their pixels.
        """
        config, x = self.config, inputs["pixels"] if target is None else target
        share = x[0].numel() / inputs["pixels"][0].numel()
        terms = {
            config.reconstruction: Term(
                reconstruction_loss(x_hat, x, config.reconstruction),
                config.reconstruction_weight * share,
            )
        }
        if config.perceptual == "lpips":
            distance = self._lpips.module(x_hat, x)
            terms["perceptual"] = Term(distance, config.perceptual_weight * share)
        elif config.perceptual == "teacher":
            is_other = x is not inputs["pixels"]
            features = self._teacher.module.features(x) if is_other else inputs["features"]
            distance = teacher_distance(self._teacher.module, x_hat, features)
            terms["perceptual"] = Term(distance, config.perceptual_weight * share)
        return terms

    def images_compared(self, terms: Mapping[str, Term]) -> Tensor:
        """The weighted sum of those terms that compare images, a scalar: what adaptive weights adapt to."""
        compared = [terms[n] for n in (self.config.reconstruction, "perceptual") if n in terms]
        return sum(term.weight * term.value.mean() for term in compared)

    def adversarial_terms(
        self, x_hat: Tensor, terms: Mapping[str, Term], step: int, draws: Draws | None = None
    ) -> dict[str, Term]:
        """The generator's side of the adversarial part, from its first step on.

        Args:
            terms: the others; the weight adapts to those that compare images.
            draws: of the step; only ``adversarial.augment`` needs them.
        """
        config = self.config.adversarial
        if config is None or step < config.start_step:
            return {}
        wanted = self.images_compared(terms)
        discriminator, layer = self._discriminator.module, self.last_layer
        return {
            "adversarial": generator_term(config, discriminator, x_hat, wanted, layer, step, draws)
        }

    def frozen_modules(self) -> list[nn.Module]:
        """What this learner reads and nobody trains."""
        return [held.module for held in (self._teacher, self._lpips) if held.module is not None]


# The objective: two learners ---------------------------------------------------------------------


class ImageLossObjective(TokenizerObjective):
    """A learner that decodes images and, where the recipe has an adversarial loss, the discriminator.

    Args:
        name: of that learner.
        make: builds it, given the settings, the context, and the discriminator's network or None.

    Raises:
        ValueError: images that the networks do not fit.
        UserError: a teacher that does not take images of this shape.
    """

    def __init__(
        self,
        config: ImageLossConfig,
        context: MethodContext,
        name: str,
        make: Callable[[Any, MethodContext, nn.Module | None], ImageLossLearner],
    ) -> None:
        super().__init__()
        self.config, self.context = config, context
        self.teacher = Unregistered(context.teacher) if context.teacher is not None else None
        if context.teacher is not None:
            context.teacher.check_grid(context.teacher.grid(context.image_size))
        adversary = None
        if config.adversarial is not None:
            adversary = DiscriminatorLearner(config.adversarial, resumes=context.resumes)
        learner = make(config, context, adversary and adversary.discriminator)
        self.learners = nn.ModuleDict({name: learner})
        if adversary is not None:
            adversary.reconstruct, adversary.target = learner.fresh_reconstruction, learner.target
            self.learners["discriminator"] = adversary
        if min(context.image_size) < 8:
            raise ValueError(
                f"image size {context.image_size} is too small to measure SSIM; at least 8"
            )
        self.tokenizer(self.averaged_module()).check_image_size(context.image_size)
        self._check_smallest(learner.smallest(context.image_size), adversary)

    def _check_smallest(
        self, size: tuple[int, int], adversary: DiscriminatorLearner | None
    ) -> None:
        """Raises ValueError where the smallest images that are compared are too small for networks."""
        try:
            if adversary is not None:
                adversary.check_image_size(size)
            if self.config.perceptual == "lpips":
                check_lpips_size(self.config.lpips_net, size)
        except ValueError as error:
            if size == tuple(self.context.image_size):
                raise
            way_out = "these method.equivariance.scales make; leave the small ones out"
            raise ValueError(f"{error}, which {way_out}") from None

    @property
    def learner(self) -> ImageLossLearner:
        """The one that decodes images."""
        return next(iter(self.learners.values()))

    def active_learners(self, step: int) -> list[str]:
        config, names = self.config.adversarial, list(self.learners)
        return names[:1] if config is None or step < config.first_step else names

    def steps_in_turn(self) -> bool:
        return self.config.adversarial is not None and self.config.adversarial.fresh

    def optimiser_config(self, learner: str, default: OptimiserConfig) -> OptimiserConfig:
        config = self.config.adversarial
        own = config.optimiser if config is not None and learner == "discriminator" else None
        return own or default

    def adversaries(self) -> list[nn.Module]:
        """The discriminator's network, where there is one."""
        return [each.discriminator for each in list(self.learners.values())[1:]]

    def frozen_modules(self) -> list[nn.Module]:
        judges = [held for each in self.adversaries() for held in each.frozen_modules()]
        return [*self.learner.frozen_modules(), *judges]
