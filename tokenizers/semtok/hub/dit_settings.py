"""What the settings in a transformer's file mean: how it was trained, on which latents, and how it is sampled.

Two kinds of files: arguments (SiT, REPA and those made from them) and configurations (LightningDiT, SFD). What a file
does not say is as published.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import cache
from typing import Any, get_args

from semtok.diffusion.diffusion_config import DiffusionConfig
from semtok.hub.file_settings import ANOTHER_NETWORK, BOOKKEEPING, DIFFERS, FileSettings
from semtok.hub.formats import Format
from semtok.hub.headed_dit import TIMES
from semtok.hub.import_dit import ImportedDiT
from semtok.hub.sr_dit import GLOBAL_WEIGHT, LATENT_SCALE, learnt, shift_base
from semtok.references import recipe_folder
from semtok.sampler.architecture import PRESETS, DiTArchitecture, architecture
from semtok.sampler.latents import LatentSpec
from semtok.sampler.sampling import SamplerConfig
from semtok.sampler.transport import PathName, TimeConfig
from semtok.settings import parse, read_yaml

_PATHS: dict[str, PathName] = {"linear": "linear", "cosine": "cosine", "gvp": "cosine"}
_PREDICTIONS = {"v": True, "velocity": True}
_POSSIBLE = "velocities on the linear and the cosine (GVP) path"
_LAWS = {"uniform": TimeConfig(), "lognormal": TimeConfig(law="logit_normal")}
_LEAD = 0.3  # SFD's, which its published weights were trained with
_DROPOUT = 0.1  # everybody's
_SHOWN = "kept for readers"
_SIZE_FATE = "agrees with the tensors"

# Recipes of the published networks, for how each is sampled.
_RECIPES: dict[Format, str] = {"sit": "sit_xl2", "repa": "sit_xl2_repa", "reg": "sit_xl2_reg"}
_RECIPES |= {"reglue": "sit_xl2_reglue", "repa-e": "sit_xl2_repa", "sfd": "lightningdit_xl1_sfd"}
_RECIPES |= {"lightningdit": "lightningdit_xl1", "redi": "sit_b2_redi", "sr-dit": "srdit_b1"}
_RECIPES |= {"ddt": "ddt_xl2", "dit-dh": "rae_ditdh_xl"}
_REPAS: frozenset[Format] = frozenset({"repa", "reg", "reglue", "repa-e", "sr-dit"})
_OF_ANY_SIZE = ("num_channels", "base")  # of guidance
_SIT_CHANNELS = 3  # which of its texture SiT guides


@dataclass(frozen=True)
class TrainedWith:
    """How a transformer was trained; None: its file does not say.

    Attributes:
        lead: by how much the semantics lead.
        semantic_channels: the last channels, which are the semantic part.
        stride: image pixels per cell of the texture.
        null_label: whether the label table has a row for none.
        unscaled: parts whose latents the network saw as they are, not standardised.
        multiplier: what standardised latents were multiplied by.
        part_weights: of the parts' squared errors.
        semantic_weight: of the semantic channels in one mean over all channels.
        cosine_weight: see ``DiffusionConfig``.
        shift_base: see ``sr_dit.shift_base``; None also of others.
        latent_scale: what raw image latents were multiplied by, whatever the tokenizer's statistics are.
        more: further settings of ``DiffusionConfig``, by name.
        shown: what only readers want to know, by its name in the file.
    """

    path: PathName = "linear"
    time: TimeConfig | None = None
    class_dropout: float = _DROPOUT
    null_label: bool = True
    lead: float | None = None
    semantic_channels: int | None = None
    stride: int | None = None
    unscaled: tuple[str, ...] = ()
    multiplier: float = 1.0
    part_weights: Mapping[str, float] = field(default_factory=dict)
    semantic_weight: float | None = None
    cosine_weight: float | None = None
    shift_base: float | None = None
    latent_scale: float | None = None
    more: Mapping[str, Any] = field(default_factory=dict)
    shown: Mapping[str, Any] = field(default_factory=dict)

    def loss_weights(self, spec: LatentSpec) -> dict[str, float] | None:
        """As ``DiffusionConfig`` has them: of the mean over a part's own channels; None: the tokenizer's."""
        weights = {n: w for n, w in self.part_weights.items() if n in spec.names}
        if self.semantic_weight is not None and "semantic" in spec.names:
            texture, semantic = spec["texture"].channels, spec["semantic"].channels
            weights["texture"] = texture / (texture + semantic)
            weights["semantic"] = self.semantic_weight * semantic / (texture + semantic)
        return weights or None


def read_training(settings: FileSettings, format: Format) -> TrainedWith:
    """What a file says of its training.

    Raises:
        UserError: by name, a setting that this library has not.
    """
    if settings.has_network_config:
        return _of_config(settings, format)
    if format in TIMES:
        return TrainedWith(time=TIMES[format])
    return _of_arguments(settings, format)


def _path(settings: FileSettings, prefix: str) -> PathName:
    settings.one_of(f"{prefix}prediction", _PREDICTIONS, "as here", default=True, instead=_POSSIBLE)
    for name in ("loss_weight", "sample_eps", "train_eps"):
        settings.only(f"{prefix}{name}", None, 0, instead=f"networks trained without {name}")
    fate = "decides the path"
    return settings.one_of(f"{prefix}path_type", _PATHS, fate, default="linear", instead=_POSSIBLE)


def _of_arguments(settings: FileSettings, format: Format) -> TrainedWith:
    path = _path(settings, "")
    fate = "decides the law of training times"
    time = settings.one_of(
        "weighting", _LAWS, fate, default=TimeConfig(), instead="uniform and lognormal times"
    )
    if path == "cosine" and time.law != "uniform":
        raise settings.refusal("weighting", "on the cosine path only uniform can be imported")
    dropout = settings.number("cfg_prob", "decides class dropout", default=_DROPOUT, most=1.0)
    if settings.take("legacy", bool, "decides class dropout", False):
        dropout = 1 - (1 - dropout) ** 2  # labels were dropped twice
    fate = "decides a loss's weight"
    weights = {
        part: settings.number(name, fate, default=0.0)
        for name, part in (("cls", "global"), ("lam", "semantic"))
        if settings.values.get(name) is not None
    }
    names = ("enc_type", "vae", "vae_name", "interm_layers", "encoder_channel_list")
    shown = {name: settings.take(name, object, _SHOWN) for name in names if name in settings}
    settings.take("encoder_depth", int, BOOKKEEPING)
    trained = TrainedWith(
        path=path,
        time=time if "weighting" in settings else None,
        class_dropout=dropout,
        null_label=dropout > 0,
        part_weights=weights,
        semantic_channels=_coded_channels(settings),
        shown=shown,
    )
    if format != "sr-dit":
        return trained
    return replace(
        trained,
        time=time,
        part_weights={"global": GLOBAL_WEIGHT} | weights,
        shift_base=shift_base(settings),
        latent_scale=LATENT_SCALE,
        more=learnt(settings),
    )


def _coded_channels(settings: FileSettings) -> int | None:
    """REGLUE's, said twice: the last of the compressor's widths, and a number."""
    channels = settings.take("feat_channels", int, "decides the split of the channels")
    widths = settings.take("encoder_channel_list", str, _SHOWN)
    if widths is None:
        return channels
    last = widths.rpartition(",")[2].strip()
    if not last.isdecimal() or (channels is not None and int(last) != channels):
        raise settings.refusal(
            "encoder_channel_list", f"its end is not feat_channels, which is {channels}"
        )
    return int(last)


def _of_config(settings: FileSettings, format: Format) -> TrainedWith:
    path, fate = _path(settings, "transport."), "decides the law of training times"
    lognormal = settings.take("transport.use_lognorm", bool, fate)
    cosine = settings.take("transport.use_cosine_loss", bool, "decides a loss's weight")
    dropout = settings.number(
        "model.class_dropout_prob", "decides class dropout", default=_DROPOUT, most=1.0
    )
    norms = (("data.latent_norm", "texture"), ("data.latent_sv_norm", "semantic"))
    fate = "decides what the latents are scaled by"
    unscaled = tuple(part for name, part in norms if not settings.take(name, bool, fate, True))
    multiplier = settings.number("data.latent_multiplier", fate, default=1.0, least=1e-6, most=1e6)
    semantic = settings.take("model.semantic_chans", int, "decides the split of the channels")
    lead = weight = None
    if format == "sfd":
        fate = "decides by how much the semantics lead"
        lead = settings.number("model.semfirst_delta_t", fate, default=_LEAD, most=1.0)
        if "model.semantic_weight" in settings:
            fate = "decides a loss's weight"
            weight = settings.number("model.semantic_weight", fate, default=1.0)
    return TrainedWith(
        path=path,
        time=None if lognormal is None else _LAWS["lognormal" if lognormal else "uniform"],
        class_dropout=dropout,
        null_label=dropout > 0,
        lead=lead,
        semantic_channels=semantic or None,
        stride=settings.take("vae.downsample_ratio", int, "decides the latents' stride"),
        unscaled=unscaled,
        multiplier=multiplier,
        semantic_weight=weight,
        cosine_weight=None if cosine is None else float(cosine),
        shown={
            name: settings.take(name, object, _SHOWN)
            for name in ("vae.model_name",)
            if name in settings
        },
    )


# Against the tensors -----------------------------------------------------------------------------


def check_network(
    settings: FileSettings, imported: ImportedDiT, image_size: int | None, lead: float | None
) -> None:
    """Compares what a file says of its network with the network that its tensors are.

    Args:
        image_size: pixels along a side that the network's grid stands for; None: not known.
        lead: of the semantics, as the file says it.

    Raises:
        UserError: they differ; the message names the setting.
    """
    shape, is_config = imported.network.config, settings.has_network_config
    prefix = "model." if is_config else ""
    data = "data." if is_config else ""
    # SR-DiT's tensors say all of this themselves, the heads too, by their rotary table.
    decide = shape.split is not None
    _check_model(settings, f"{prefix}{'model_type' if is_config else 'model'}", shape, decide)
    classes = imported.network.num_classes
    settings.check(f"{data}num_classes", classes, tensors_decide=decide)
    checks: dict[str, Any] = {"use_qknorm" if is_config else "qk_norm": bool(shape.qk_norm)}
    if is_config:
        checks |= {"use_swiglu": shape.swiglu, "use_rope": shape.rope}
        checks |= {"use_rmsnorm": shape.rms_norm, "wo_shift": imported.without_shifts}
        checks |= {"in_chans": imported.channels, "learn_sigma": imported.learns_sigma}
    for name, own in checks.items():
        settings.check(f"{prefix}{name}", own)
    if imported.first_blocks is not None:
        settings.check("encoder_depth", imported.first_blocks)
    for name in (f"{data}image_size", "resolution"):
        if name in settings and image_size is None:
            settings.take(name, int, "not looked at: a network alone knows no pixels")
        elif image_size is not None:
            settings.check(name, image_size, what="its grid and the latents' stride say")
    leads = bool(imported.network.timed_parts)
    if lead is not None and "model.semfirst_delta_t" in settings and leads != (lead > 0):
        times = "times of both parts" if leads else "one time"
        raise settings.refusal("model.semfirst_delta_t", f"its tensors take {times}")


def _check_model(
    settings: FileSettings, name: str, shape: DiTArchitecture, tensors_decide: bool
) -> None:
    model = settings.take(name, str, f"{BOOKKEEPING}: no published name")
    preset = PRESETS.get(model) if model is not None else None
    if preset is None:
        return
    settings.fates[name] = _SIZE_FATE
    for key in ("depth", "width", "heads", "patch_size"):
        if getattr(preset, key) != getattr(shape, key):
            if tensors_decide:
                settings.fates[name] = DIFFERS
                return
            differ = f"which has {key} {getattr(preset, key)}, its tensors {getattr(shape, key)}"
            raise settings.refusal(name, f"{differ}; {ANOTHER_NETWORK}")


def check_latents(settings: FileSettings, trained: TrainedWith, spec: LatentSpec) -> None:
    """Raises UserError where the file says of its latents what the tokenizer's are not."""
    semantic = spec["semantic"].channels if "semantic" in spec.names else 0
    told = next(
        (
            n
            for n in ("model.semantic_chans", "feat_channels", "encoder_channel_list")
            if n in settings
        ),
        None,
    )
    if told is not None and (trained.semantic_channels or 0) != semantic:
        raise settings.refusal(told, f"the tokenizer's latents have {semantic} semantic channels")
    settings.check(
        "vae.downsample_ratio",
        spec["texture"].stride,
        what="the tokenizer's latents have a stride of",
    )


# How it is sampled -------------------------------------------------------------------------------


def sampler_for(format: Format, network: DiTArchitecture, settings: FileSettings) -> SamplerConfig:
    """How a network is sampled: as its recipe says, and where its file says something, as that says.

    Guidance was tuned for one size; networks of others are sampled without, as their papers report them.

    Raises:
        UserError: by name, a setting that samplers here have not.
    """
    content: dict[str, Any] = {}
    recipe = _recipe(_RECIPES[format])
    if recipe:
        content = dict(recipe.get("sampler", {}))
        guidance = dict(content.get("guidance", {}))
        tuned_for = architecture(DiffusionConfig(network=recipe["diffusion"]["network"]).network)
        if (tuned_for.depth, tuned_for.width) != (network.depth, network.width):
            guidance = {n: value for n, value in guidance.items() if n in _OF_ANY_SIZE}
        content["guidance"] = guidance
    # The same on the linear path, which recipes take; files may have the cosine one.
    content["diffusion"] = "linear" if format in _REPAS else "sigma"
    if format == "sit":
        content["guidance"] = {"num_channels": _SIT_CHANNELS} | content.get("guidance", {})
    return parse(SamplerConfig, content | _own_sampler(settings, content), settings.place)


@cache
def _recipe(name: str) -> Mapping[str, Any]:
    """The published recipe of that name; empty where there are no recipes. Not to be changed."""
    folder = recipe_folder()
    return {} if folder is None else read_yaml(folder / "imagenet256" / f"{name}.yaml")


def _own_sampler(settings: FileSettings, published: Mapping[str, Any]) -> dict[str, Any]:
    """The ``sample`` section of LightningDiT's and SFD's configurations."""
    own: dict[str, Any] = {}
    settings.only("sample.mode", "ODE", instead="samplers of the ODE")
    for name in ("reverse", "likelihood"):
        settings.only(f"sample.{name}", False, instead="samplers from noise to images")
    fate = "decides the sampler"
    methods = get_args(SamplerConfig.model_fields["method"].annotation)
    methods = [name for name in methods if name != "sde"]
    if "sample.sampling_method" in settings:
        own["method"] = settings.one_of(
            "sample.sampling_method",
            {name: name for name in methods},
            fate,
            default="euler",
            instead=f"the samplers {', '.join(methods)}",
        )
    if "sample.num_sampling_steps" in settings:  # points, one more than steps
        points = settings.number("sample.num_sampling_steps", fate, default=250, least=2)
        own["steps"] = int(points) - 1
    for name in ("rtol", "atol"):
        if f"sample.{name}" in settings:
            own[name] = settings.number(f"sample.{name}", fate, default=1e-3, least=1e-12, most=10)
    if "sample.timestep_shift" in settings:
        shift = settings.number("sample.timestep_shift", fate, default=0.0)
        own["shift"] = 1 / shift if shift > 0 else None
    return own | _own_guidance(settings, published)


def _own_guidance(settings: FileSettings, published: Mapping[str, Any]) -> dict[str, Any]:
    guidance, fate = dict(published.get("guidance", {})), "decides guidance"
    start = settings.number("sample.cfg_interval_start", fate, default=0.0, most=1.0)
    if "sample.cfg_interval_start" in settings:
        guidance["interval"] = [start, 1.0]
    if "sample.cfg_scale" in settings:
        scale = settings.number("sample.cfg_scale", fate, default=1.0)
        guidance["scale"] = scale if scale > 1 else 1.0  # the published samplers guide above 1 only
    modes = ("both", "tex", "sem") if start == 0 else ("both",)
    settings.only(
        "model.semfirst_infer_interval_mode", *modes, instead="guidance intervals of both parts"
    )
    return {"guidance": guidance}
