"""Options of every command that draws images: how they are sampled."""

import argparse
import math
from typing import get_args

from semtok.diffusion.generator import Generator
from semtok.errors import UserError
from semtok.sampler.sampling import SamplerConfig
from semtok.settings import parse
from semtok.speed import Compiler


def add_sampler_options(parser: argparse.ArgumentParser) -> None:
    """The sampler's method, steps and guidance; each by default the model's own."""
    parser.add_argument(
        "--method", choices=("euler", "heun", "dopri5", "sde"), help="default: the model's own"
    )
    parser.add_argument("--steps", type=int, help="sampler steps; default: the model's own")
    parser.add_argument(
        "--guidance",
        nargs="+",
        metavar="W",
        help="guidance scale, 1 is none; or one for each part, as texture=1.5 semantic=2",
    )
    parser.add_argument(
        "--interval",
        nargs=2,
        type=float,
        metavar=("BEGIN", "END"),
        help="guide between these times, noise 0 to data 1",
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


def sped_up(generator: Generator, args: argparse.Namespace) -> Generator:
    """The same generator, as fast as the options say."""
    return generator.speed_up(precision=args.precision or "fp32", compile=args.compile or "none")


def sampler_from(args: argparse.Namespace, generator: Generator) -> SamplerConfig:
    """The model's own sampler, with what the options change.

    Raises:
        UserError: an option out of range, or a part that the model does not have.
    """
    own = generator.sampler
    if args.steps is not None and args.steps < 1:
        raise UserError(f"--steps: expected at least 1, got {args.steps}")
    guidance = own.guidance.model_dump()
    if args.guidance is not None:
        guidance["scale"] = _scale(args.guidance, generator)
    if args.interval is not None:
        begin, end = guidance["interval"] = args.interval
        if not 0 <= begin <= end <= 1:
            raise UserError(f"--interval: expected 0 <= BEGIN <= END <= 1, got {args.interval}")
    changes = {"method": args.method, "steps": args.steps, "guidance": guidance}
    given = {k: v for k, v in changes.items() if v is not None}
    return parse(SamplerConfig, own.model_dump() | given, "--method, --steps")


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
