"""Options of every command that draws images: how they are sampled."""

import argparse
import math
import sys
from collections.abc import Mapping
from typing import Any, get_args

from semtok.diffusion.generator import Generator
from semtok.errors import UserError
from semtok.sampler.guidance import Base, GuidanceConfig
from semtok.sampler.request import NEEDED
from semtok.sampler.sampling import METHODS_OF, ErrorOver, Method, SamplerConfig
from semtok.sampler.transport import Diffusion
from semtok.settings import parse
from semtok.speed import Compiler

SAMPLER_OPTIONS = (
    *("method", "steps", "diffusion", "error_over", "state_refresh_rate"),
    *("guidance", "guidance_base", "interval", "num_channels", "precision", "compile"),
)
"""Names of the options, as ``argparse`` keeps them."""


def add_sampler_options(parser: argparse.ArgumentParser) -> None:
    """The sampler's method, steps and guidance; each by default the model's own."""
    parser.add_argument("--method", choices=get_args(Method), help="default: the model's own")
    parser.add_argument("--steps", type=int, help="sampler steps; default: the model's own")
    parser.add_argument(
        "--diffusion",
        choices=get_args(Diffusion),
        help="form of sde's diffusion coefficient: sigma is SiT's, linear REPA's; default: the model's own",
    )
    parser.add_argument(
        "--error-over",
        choices=get_args(ErrorOver),
        help="what dopri5 chooses its steps by: each image's own error, or that of all that are drawn at once, "
        "so that images depend on how many these are; default: the model's own",
    )
    parser.add_argument(
        "--state-refresh-rate",
        type=int,
        metavar="N",
        help="of a network with a head: run the blocks before it in every N steps only; default: the model's own",
    )
    parser.add_argument(
        "--guidance",
        nargs="+",
        metavar="W",
        help="guidance scale, 1 is none; or one for each part, as texture=1.5 semantic=2",
    )
    parser.add_argument(
        "--guidance-base",
        choices=get_args(Base),
        help="what guidance moves away from: the prediction without a class; that without a class and without the "
        "blocks that token routing thins out; or that of a second head; default: the model's own",
    )
    parser.add_argument(
        "--interval",
        nargs=2,
        type=float,
        metavar=("BEGIN", "END"),
        help="guide between these times, noise 0 to data 1",
    )
    parser.add_argument(
        "--num-channels",
        type=int,
        metavar="N",
        help="guide the first channels of the texture only, as SiT's and LightningDiT's figures do with 3",
    )
    parser.add_argument(
        "--precision",
        choices=("fp32", "tf32", "bf16"),
        help="of the transformer, by default fp32; images differ by rounding, speed on a GPU by much",
    )
    parser.add_argument(
        "--compile",
        choices=get_args(Compiler),
        help="torch.compile's backend; pays where many images are drawn",
    )


def add_weak_option(parser: argparse.ArgumentParser) -> None:
    """Which weaker model guides."""
    parser.add_argument(
        "--weak", metavar="MODEL", help="autoguidance: guide away from this weaker model"
    )


def load_weak(
    args: argparse.Namespace, generator: Generator, sampler: SamplerConfig
) -> Generator | None:
    """The weaker model that the options name, on the CPU; None: no other guides.

    Raises:
        UserError: there is none, or it would have no effect.
    """
    if args.weak is None:
        return None
    if not _guided(sampler.guidance, generator.network.spec.names):
        raise UserError("--weak needs a guidance scale other than 1; give --guidance W")
    if args.guidance_base is not None:
        raise UserError("--guidance-base: --weak takes its place; give one of them")
    return Generator.from_pretrained(args.weak)


def sped_up(generator: Generator, args: argparse.Namespace) -> Generator:
    """The same generator, as fast as the options say."""
    return generator.speed_up(precision=args.precision or "fp32", compile=args.compile or "none")


def sampler_from(args: argparse.Namespace, generator: Generator) -> SamplerConfig:
    """The model's own sampler, with what the options change.

    Raises:
        UserError: an option out of range, one that the sampler makes no use of, or a part that the model does
            not have.
    """
    own = generator.sampler
    if args.steps is not None and args.steps < 1:
        raise UserError(f"--steps: expected at least 1, got {args.steps}")
    _check_method(args, args.method or own.method, generator)
    changes = {
        "method": args.method,
        "steps": args.steps,
        "diffusion": args.diffusion,
        "error_over": args.error_over,
        "state_refresh_rate": args.state_refresh_rate,
        "guidance": _guidance(args, generator),
    }
    given = {k: v for k, v in changes.items() if v is not None}
    settings = own.model_dump() | _without_those_of(own, args.method or own.method) | given
    told = [name for name in SAMPLER_OPTIONS if getattr(args, name, None) is not None]
    place = ", ".join(f"--{name.replace('_', '-')}" for name in told)
    sampler = parse(SamplerConfig, settings, place or "sampler")
    _check_use(args, sampler, generator)
    return sampler


def _without_those_of(own: SamplerConfig, method: str) -> dict[str, Any]:
    """Defaults in the place of settings that the model's own method takes and another one does not; a line says so."""
    left = {}
    for name, methods in METHODS_OF.items():
        default = SamplerConfig.model_fields[name].default
        if method != own.method and method not in methods and getattr(own, name) != default:
            left[name] = default
            print(f"note: sampler.{name} of this model does not go with {method}", file=sys.stderr)
    return left


def _guidance(args: argparse.Namespace, generator: Generator) -> Mapping[str, Any]:
    guidance = generator.sampler.guidance.model_dump()
    if args.guidance is not None:
        guidance["scale"] = _scale(args.guidance, generator)
    if args.guidance_base is not None:
        guidance["base"] = args.guidance_base
    if args.interval is not None:
        begin, end = guidance["interval"] = args.interval
        if not 0 <= begin <= end <= 1:
            raise UserError(f"--interval: expected 0 <= BEGIN <= END <= 1, got {args.interval}")
    if args.num_channels is not None:
        guidance["num_channels"] = args.num_channels
        most = generator.network.spec["texture"].channels
        if not 1 <= args.num_channels <= most:
            raise UserError(
                f"--num-channels: expected 1 to {most}, the texture's channels, got {args.num_channels}"
            )
    return guidance


def _check_method(args: argparse.Namespace, method: str, generator: Generator) -> None:
    """Refuses options that a method, or a network, makes no use of."""
    if args.steps is not None and method == "dopri5":
        raise UserError("--steps: dopri5 chooses its steps; leave it out, or take another --method")
    if args.diffusion is not None and method != "sde":
        raise UserError(f"--diffusion: goes with --method sde, not {method}")
    if args.error_over is not None and method != "dopri5":
        raise UserError(f"--error-over: goes with --method dopri5, not {method}")
    if args.state_refresh_rate is not None:
        if method not in METHODS_OF["state_refresh_rate"] and args.state_refresh_rate > 1:
            raise UserError(f"--state-refresh-rate: goes with --method euler and sde, not {method}")
        if generator.network.config.head is None:
            raise UserError(
                "--state-refresh-rate: this model has no head that could be run alone; leave it out"
            )


def _check_use(args: argparse.Namespace, sampler: SamplerConfig, generator: Generator) -> None:
    """Refuses options of guidance that would change nothing."""
    guidance = sampler.guidance
    if args.guidance_base is not None:
        _check_base(args.guidance_base, guidance, generator)
    if args.interval is not None and not _guided(guidance, generator.network.spec.names):
        raise UserError("--interval: nothing is guided; give --guidance W, other than 1")
    if args.num_channels is not None and not _guided(guidance, ("texture",)):
        raise UserError(
            "--num-channels: the texture is not guided; give --guidance W, other than 1"
        )


def _check_base(base: Base, guidance: GuidanceConfig, generator: Generator) -> None:
    if not guidance.guides:
        raise UserError("--guidance-base: nothing is guided; give --guidance W, other than 1")
    possible = [name for name, can_be in generator.can_be_guided.items() if can_be]
    if base not in possible:
        way = f"pass {' or '.join(possible)}" if possible else "it can't be guided"
        raise UserError(f"--guidance-base: this model was trained without {NEEDED[base]}; {way}")


def _guided(guidance: GuidanceConfig, parts: tuple[str, ...]) -> bool:
    return any(guidance.scale_of(part) != 1 for part in parts)


def _scale(words: list[str], generator: Generator) -> float | dict[str, float]:
    parts = generator.network.spec.names
    try:
        if len(words) == 1 and "=" not in words[0]:
            return _finite(words[0])
        scales = {name: _finite(value) for name, value in (word.split("=", 1) for word in words)}
    except ValueError:
        raise UserError(
            f"--guidance: expected a number, or PART=number …, got {' '.join(words)}"
        ) from None
    unknown = scales.keys() - set(parts)
    if unknown:
        raise UserError(f"--guidance: no part {sorted(unknown)}; this model's: {', '.join(parts)}")
    return scales


def _finite(word: str) -> float:
    value = float(word)
    if not math.isfinite(value):
        raise ValueError(word)
    return value
