"""Settings of the diffusion transformer: the ``diffusion:`` section of its recipes."""

from typing import Annotated

from pydantic import Field, field_validator

from semtok.config import Config
from semtok.diffusion.dit import DiT, DiTArchitecture, architecture
from semtok.diffusion.transport import PathName, Schedule, TimeConfig
from semtok.latents import LatentSpec
from semtok.tokenizer import Tokenizer

Weight = Annotated[float, Field(ge=0)]


class REPAConfig(Config):
    """Representation alignment (REPA, Yu et al. 2024): a block's tokens resemble the teacher's."""

    weight: float = Field(0.5, ge=0)
    depth: int = Field(8, ge=1)
    """After which block; REPA has 8 for L and XL, 4 for B."""
    projector_width: int = Field(2048, ge=1)


class DiffusionConfig(Config):
    """Settings of the diffusion transformer and its training."""

    network: str | DiTArchitecture
    """A preset such as SiT-B/2 or LightningDiT-XL/1, or a shape spelt out."""
    path: PathName = "linear"
    time: TimeConfig = TimeConfig()
    leads: dict[str, float] | None = None
    """Per part, by how much of the time axis it leads; None: the tokenizer's defaults."""
    loss_weights: dict[str, Weight] | None = None
    """Per part, of the velocity's squared error; None: the tokenizer's defaults."""
    cosine_weight: float = Field(0.0, ge=0)
    """Of 1 - cosine between predicted and true velocity over each part's channels (LightningDiT)."""
    unconditional: bool = False
    """Without classes: the data's labels are not used."""
    class_dropout: float = Field(0.1, ge=0, le=1)
    """How often a label is replaced by the null label, which guidance needs."""
    repa: REPAConfig | None = None
    checkpointing: bool = False
    """Recompute activations in the backward pass, to save memory."""

    @property
    def schedule(self) -> Schedule:
        """When each part is denoised; of unresolved leads, the texture's alone."""
        return Schedule.from_leads(self.leads or {"texture": 0.0})

    @field_validator("network")
    @classmethod
    def _known(cls, network: str | DiTArchitecture) -> str | DiTArchitecture:
        architecture(network)
        return network


def build_network(config: DiffusionConfig, spec: LatentSpec, *, num_classes: int) -> DiT:
    """The network that resolved settings and a spec describe, freshly initialised."""
    schedule = config.schedule
    # Parts whose time the network is told separately, the leading ones first; none without a lead.
    ordered = sorted(schedule.starts, key=lambda name: schedule.starts[name])
    return DiT(
        architecture(config.network),
        spec,
        num_classes=num_classes,
        timed_parts=() if schedule.is_synchronous else tuple(ordered),
    )


def resolve_defaults(config: DiffusionConfig, tokenizer: Tokenizer) -> DiffusionConfig:
    """Fills leads and loss weights from the tokenizer's defaults.

    Raises:
        ValueError: a part that the tokenizer does not have.
    """
    defaults = tokenizer.diffusion_defaults
    for key in ("leads", "loss_weights"):
        unknown = (getattr(config, key) or {}).keys() - defaults.keys()
        if unknown:
            raise ValueError(
                f"diffusion.{key}: no part {sorted(unknown)} in this tokenizer's latents; its parts: "
                f"{', '.join(defaults)}"
            )
    leads = {name: d.lead for name, d in defaults.items()} | (config.leads or {})
    weights = {n: d.loss_weight for n, d in defaults.items()} | (config.loss_weights or {})
    return config.model_copy(update={"leads": leads, "loss_weights": weights})
