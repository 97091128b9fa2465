"""Settings of the diffusion transformer: the ``diffusion:`` section of its recipes."""

from typing import Annotated, Any, Literal

from pydantic import Field, field_validator

from semtok.sampler.dit import DiT, DiTArchitecture, architecture
from semtok.sampler.latents import LatentSpec
from semtok.sampler.sampling import SamplerConfig
from semtok.sampler.transport import PathName, Schedule, TimeConfig
from semtok.settings import Config, parse
from semtok.tokenizer import Tokenizer

Weight = Annotated[float, Field(ge=0)]


class REPAConfig(Config):
    """Representation alignment (REPA, Yu et al. 2024): a block's tokens resemble the teacher's."""

    weight: float = Field(0.5, ge=0)
    """Weight of the alignment loss."""
    depth: int | None = Field(None, ge=1)
    """After which block; None: a third of them, at most 8, which is REPA's 4 for B and 8 for L and XL."""
    projector_width: int | None = Field(None, ge=1)
    """None: REPA's 2048; in networks narrower than SiT-S twice their width, as the projector would cost
    more than the network."""
    loss: Literal["cosine", "cosine_mse"] = "cosine"
    """``cosine_mse`` is the mean of 1 - cosine and of the squared error (SFD, table 19)."""
    targets: Literal["teacher", "decoded"] = "teacher"
    """What the tokens are compared with: the teacher's features of the image; or those that the frozen
    coder decodes from the semantic latents, for which neither the image nor the teacher is needed (ours)."""
    with_global: bool = False
    """The token of the global part is aligned to the teacher's pooled token, as one more position."""

    def depth_in(self, num_blocks: int) -> int:
        """After which of a network's blocks."""
        return self.depth if self.depth is not None else min(8, max(1, num_blocks // 3))

    def projector_width_for(self, width: int) -> int:
        """Hidden width of the projector of a network of this width."""
        if self.projector_width is not None:
            return self.projector_width
        return 2048 if width >= 384 else 2 * width


class DiffusionConfig(Config):
    """Settings of the diffusion transformer and its training."""

    network: str | DiTArchitecture
    """A preset such as SiT-B/2 or LightningDiT-XL/1, or a shape spelt out."""
    path: PathName = "linear"
    """From noise to data: a straight line, or a quarter of a circle."""
    time: TimeConfig = TimeConfig()
    """Which times training draws."""
    leads: dict[str, float] | None = None
    """Per part, by how much of the time axis it leads; None: the tokenizer's defaults."""
    loss_weights: dict[str, Weight | dict[int, Weight]] | None = None
    """Per part, of the mean squared error of its velocity; None: the tokenizer's defaults. Either one
    weight, or weights by the step (0-based) from which they hold: {0: 1.0, 250000: 0.5}."""
    cosine_weight: float | None = Field(None, ge=0)
    """Of 1 - cosine between predicted and true velocity over the channels of all spatial parts together
    (LightningDiT, SFD); None: the tokenizer's default."""
    unconditional: bool = False
    """Without classes: the data's labels are not used."""
    class_dropout: float = Field(0.1, ge=0, le=1)
    """How often a label is replaced by the null label, which guidance needs."""
    repa: REPAConfig | Literal[False] | None = None
    """None: the tokenizer's default; false: none."""
    checkpointing: bool = False
    """Recompute activations in the backward pass, to save memory."""

    @property
    def schedule(self) -> Schedule:
        """When each part is denoised; of unresolved leads, the texture's alone."""
        return Schedule.from_leads(self.leads or {"texture": 0.0})

    def loss_weight(self, part: str, step: int) -> float:
        """What a part's squared error is multiplied by at a step (0-based)."""
        weight = (self.loss_weights or {}).get(part, 1.0)
        if isinstance(weight, dict):
            return weight[max(start for start in weight if start <= step)]
        return weight

    @field_validator("loss_weights")
    @classmethod
    def _from_the_first_step(cls, weights: dict[str, Any] | None) -> dict[str, Any] | None:
        for part, weight in (weights or {}).items():
            if isinstance(weight, dict) and (0 not in weight or min(weight) < 0):
                raise ValueError(f"'{part}': weights by step begin with step 0, got {weight}")
        return weights

    @field_validator("network")
    @classmethod
    def _known(cls, network: str | DiTArchitecture) -> str | DiTArchitecture:
        architecture(network)
        return network


def build_network(config: DiffusionConfig, spec: LatentSpec, *, num_classes: int) -> DiT:
    """The network that resolved settings and a spec describe, freshly initialised."""
    return DiT(
        architecture(config.network),
        spec,
        num_classes=num_classes,
        timed_parts=timed_parts(config.schedule),
    )


def timed_parts(schedule: Schedule) -> tuple[str, ...]:
    """The parts whose times the network is told: one of each distinct time, the leading first.

    Empty where all share one time.
    """
    if schedule.is_synchronous:
        return ()
    by_start: dict[float, str] = {}
    for name, start in schedule.starts.items():
        by_start.setdefault(start, name)
    return tuple(by_start[start] for start in sorted(by_start))


def resolve_defaults(config: DiffusionConfig, tokenizer: Tokenizer) -> DiffusionConfig:
    """Fills what the settings leave open from the tokenizer's defaults.

    Raises:
        ValueError: a part that the tokenizer does not have, or too few blocks for REPA.
    """
    defaults, names = tokenizer.diffusion_defaults, tokenizer.spec.names
    for key in ("leads", "loss_weights"):
        unknown = (getattr(config, key) or {}).keys() - set(names)
        if unknown:
            raise ValueError(
                f"diffusion.{key}: no part {sorted(unknown)} in this tokenizer's latents; its parts: "
                f"{', '.join(names)}"
            )
    leads = dict.fromkeys(names, 0.0) | defaults.leads | (config.leads or {})
    if max(leads.values()) - min(leads.values()) > 1:
        raise ValueError(
            f"diffusion.leads: {leads} are further apart than 1, which is one part after the other"
        )
    repa = config.repa
    if repa is None:
        repa = False
        if defaults.repa is not None:
            repa = parse(REPAConfig, defaults.repa, "the tokenizer's diffusion_defaults.repa")
    if repa and repa.with_global and "global" not in names:
        raise ValueError(
            "diffusion.repa.with_global: this tokenizer's latents have no global part; its parts: "
            f"{', '.join(names)}"
        )
    cosine_weight = config.cosine_weight
    return config.model_copy(
        update={
            "leads": leads,
            "loss_weights": dict.fromkeys(names, 1.0)
            | defaults.loss_weights
            | (config.loss_weights or {}),
            "cosine_weight": defaults.cosine_weight if cosine_weight is None else cosine_weight,
            "repa": repa,
        }
    )


def check_guidance(config: DiffusionConfig, sampler: SamplerConfig, spec: LatentSpec) -> None:
    """Raises ValueError where the sampler guides what the training does not prepare for."""
    sampler.guidance.check_fits(spec)
    if all(sampler.guidance.scale_of(part) == 1 for part in spec.names):
        return
    if config.unconditional:
        raise ValueError(
            "sampler.guidance.scale: an unconditional model has no classes to guide by; pass 1"
        )
    if config.class_dropout == 0:
        raise ValueError(
            "sampler.guidance.scale: guidance needs the null label, which diffusion.class_dropout=0 never "
            "trains; pass sampler.guidance.scale=1 or some dropout"
        )
