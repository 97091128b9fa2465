"""Settings of the diffusion transformer: the ``diffusion:`` section of its recipes."""

from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import Field, field_validator, model_validator

from semtok.diffusion.repa import REPAConfig
from semtok.diffusion.routing import RoutingConfig, at_step
from semtok.sampler.architecture import DiTArchitecture, architecture
from semtok.sampler.dit import DiT
from semtok.sampler.latents import LatentSpec
from semtok.sampler.sampling import SamplerConfig
from semtok.sampler.transport import PathName, Schedule, TimeConfig
from semtok.settings import Config, parse
from semtok.tokenizer import Tokenizer

Weight = Annotated[float, Field(ge=0)]
_TOO_CONTRASTIVE = "as much as the squared error itself, or more, has no least value"


class InternalGuidanceConfig(Config):
    """A second head inside the network, for guidance without a null label (RAEv2, arXiv 2605.18324)."""

    after: int = Field(ge=1)
    """The block whose tokens it reads, fewer than all; 8 of 28 as published."""
    weight: float = Field(1.0, gt=0)
    """Of its squared error, times each part's own weight."""


class DiffusionConfig(Config):
    """Settings of the diffusion transformer and its training."""

    network: str | DiTArchitecture
    """A preset such as SiT-B/2 or LightningDiT-XL/1, or a shape spelt out, also as changes of a preset:
    {preset: SiT-B/2, qk_norm: true}."""
    path: PathName = "linear"
    """From noise to data: a straight line, or a quarter of a circle."""
    time: TimeConfig = TimeConfig()
    """Which times training draws."""
    leads: dict[str, float] | None = None
    """Per part, by how much of the time axis it leads; None: the tokenizer's defaults."""
    loss_weights: dict[str, Weight | dict[int, Weight]] | None = None
    """Per part, of the mean squared error of its velocity; None: the tokenizer's defaults. Either one
    weight, or weights by the step (0-based) from which they hold: {0: 1.0, 250000: 0.5}."""
    prediction: Literal["velocity", "data"] = "velocity"
    """What the network gives out. ``data``: the latents without noise, from which the velocity follows; losses stay
    those of the velocity (x-prediction, as RAEv2 has it)."""
    contrastive_weight: Weight | dict[str, Weight] = 0.0
    """Contrastive flow matching (Stoica et al. 2025, arXiv 2506.05350): the weight by which a predicted velocity is
    moved away from that of the image before it in the batch. A number holds for all parts, times each one's own weight;
    weights by part hold as they are, others 0 (SR-DiT: {texture: 0.05})."""
    routing: RoutingConfig | None = None
    """Token routing: most blocks see only some tokens in training. None: none."""
    internal_guidance: InternalGuidanceConfig | None = None
    """A second head, for ``sampler.guidance.base: inner_head``. None: none."""
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
        return at_step((self.loss_weights or {}).get(part, 1.0), step)

    @field_validator("loss_weights")
    @classmethod
    def _from_the_first_step(cls, weights: dict[str, Any] | None) -> dict[str, Any] | None:
        for part, weight in (weights or {}).items():
            if isinstance(weight, dict) and (0 not in weight or min(weight) < 0):
                raise ValueError(f"'{part}': weights by step begin with step 0, got {weight}")
        return weights

    def contrastive_weight_of(self, part: str, step: int) -> float:
        """What a part's distance from the image before is multiplied by at a step (0-based)."""
        if isinstance(self.contrastive_weight, dict):
            return self.contrastive_weight.get(part, 0.0)
        return self.contrastive_weight * self.loss_weight(part, step)

    @property
    def is_contrastive(self) -> bool:
        """Whether any part is moved away from the image before."""
        weights = self.contrastive_weight
        return any(weights.values()) if isinstance(weights, dict) else weights > 0

    @property
    def architecture(self) -> DiTArchitecture:
        """Of the network, with what these settings add to it."""
        inner, routing = self.internal_guidance, self.routing
        added = {
            "split": None if routing is None else (routing.first, routing.last),
            "inner_head": None if inner is None else inner.after,
            "predicts": self.prediction,
        }
        return DiTArchitecture.model_validate(architecture(self.network).model_dump() | added)

    @field_validator("network", mode="before")
    @classmethod
    def _changed(cls, network: Any) -> Any:
        """Changes of a preset, spelt out."""
        _check_set_elsewhere(network if isinstance(network, dict) else {})
        if not isinstance(network, dict) or "preset" not in network:
            return network
        preset, changes = network["preset"], {k: v for k, v in network.items() if k != "preset"}
        if not isinstance(preset, str):
            raise ValueError(f"preset: expected a name such as SiT-B/2, got {preset!r}")
        return architecture(preset).model_dump() | changes

    @field_validator("network")
    @classmethod
    def _known(cls, network: str | DiTArchitecture) -> str | DiTArchitecture:
        _check_set_elsewhere(architecture(network).model_dump())
        return network

    @model_validator(mode="after")
    def _consistent(self) -> "DiffusionConfig":
        if self.prediction == "data" and self.path != "linear":
            raise ValueError("diffusion.prediction: data goes with diffusion.path=linear")
        if not isinstance(self.contrastive_weight, dict) and self.contrastive_weight >= 1:
            raise ValueError(f"diffusion.contrastive_weight: {_TOO_CONTRASTIVE}; pass less than 1")
        self._check_blocks(architecture(self.network).depth)
        return self

    def _check_blocks(self, depth: int) -> None:
        """Raises ValueError where the network has not the blocks that settings name."""
        inner, routing = self.internal_guidance, self.routing
        if routing is not None and routing.first + routing.last >= depth:
            raise ValueError(
                f"diffusion.routing: {routing.first} first and {routing.last} last of the network's {depth} blocks "
                "leave none between; pass fewer, or a deeper network"
            )
        if inner is None:
            return
        if inner.after >= depth:
            raise ValueError(
                f"diffusion.internal_guidance.after: {inner.after} of the network's {depth} blocks; pass fewer"
            )
        if routing is not None and routing.first < inner.after <= depth - routing.last:
            raise ValueError(
                f"diffusion.internal_guidance.after: block {inner.after} sees only some tokens in training; pass "
                f"{routing.first} or fewer, or more than {depth - routing.last}"
            )


def _check_set_elsewhere(network: Mapping[str, Any]) -> None:
    """Raises ValueError where a network's shape says what other settings add to it."""
    settings = {"split": "routing", "inner_head": "internal_guidance", "predicts": "prediction"}
    for name, setting in settings.items():
        default = DiTArchitecture.model_fields[name].default
        if network.get(name, default) != default:
            raise ValueError(f"{name} is set by diffusion.{setting}; give that instead")


def build_network(config: DiffusionConfig, spec: LatentSpec, *, num_classes: int) -> DiT:
    """The network that resolved settings and a spec describe, freshly initialised."""
    return DiT(
        config.architecture,
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
    for key in ("leads", "loss_weights", "contrastive_weight"):
        given = getattr(config, key)
        unknown = (given.keys() if isinstance(given, dict) else set()) - set(names)
        if unknown:
            raise ValueError(
                f"diffusion.{key}: no part {sorted(unknown)} in this tokenizer's latents; its parts: "
                f"{', '.join(names)}"
            )
    _check_vectors(config, tokenizer.spec)
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
    resolved = config.model_copy(
        update={
            "leads": leads,
            "loss_weights": dict.fromkeys(names, 1.0)
            | defaults.loss_weights
            | (config.loss_weights or {}),
            "cosine_weight": defaults.cosine_weight if cosine_weight is None else cosine_weight,
            "repa": repa,
        }
    )
    _check_contrast(resolved)
    return resolved


def _check_vectors(config: DiffusionConfig, spec: LatentSpec) -> None:
    """Raises ValueError where settings are of vector parts, and latents have none."""
    if any(not part.is_spatial for part in spec.parts):
        return
    none = f"this tokenizer's latents have no vector part; its parts: {', '.join(spec.names)}"
    if config.routing is not None and config.routing.vectors == "routed":
        raise ValueError(f"diffusion.routing.vectors: routed: {none}")
    if architecture(config.network).vector_norm != "layer":
        raise ValueError(f"diffusion.network.vector_norm: {none}")


def _check_contrast(config: DiffusionConfig) -> None:
    """Raises ValueError where a part is moved away from others more than towards its own velocity."""
    if not isinstance(config.contrastive_weight, dict):
        return
    for part, weight in config.contrastive_weight.items():
        own = config.loss_weights[part]
        least = min(own.values()) if isinstance(own, dict) else own
        if weight and weight >= least:
            raise ValueError(
                f"diffusion.contrastive_weight.{part}: {_TOO_CONTRASTIVE}; pass less than {least:g}, its loss weight"
                if least
                else f"diffusion.contrastive_weight.{part}: the part is not learned where its loss weight is 0; pass 0"
            )


def check_guidance(config: DiffusionConfig, sampler: SamplerConfig, spec: LatentSpec) -> None:
    """Raises ValueError where the sampler guides what the training does not prepare for."""
    guidance = sampler.guidance
    guidance.check_fits(spec)
    sampler.check_network(config.architecture)
    if guidance.base == "dropped_path" and config.routing and not config.routing.path_drop:
        raise ValueError(
            "sampler.guidance.base: dropped_path is what diffusion.routing.path_drop=0 never trains; pass null_label, "
            "or some path_drop"
        )
    if all(guidance.scale_of(part) == 1 for part in spec.names) or guidance.base == "inner_head":
        return
    if config.unconditional and guidance.base == "null_label":
        raise ValueError(
            "sampler.guidance.scale: an unconditional model has no classes to guide by; pass 1"
        )
    if config.class_dropout == 0 and not config.unconditional:
        raise ValueError(
            "sampler.guidance.scale: guidance needs the null label, which diffusion.class_dropout=0 never "
            "trains; pass sampler.guidance.scale=1 or some dropout"
        )
