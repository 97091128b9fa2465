"""``benchmark``: how fast every stage trains, reads and samples; any two settings side by side."""

import argparse
import statistics
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any, get_args

import torch

from benchmarks.caching import cache_rates, encoding_rate
from benchmarks.memory import recipe_memory
from benchmarks.reglue import reglue_steps
from benchmarks.routing import optimiser_seconds, savings
from benchmarks.sampling import sampling
from benchmarks.synthetic import PUBLISHED
from benchmarks.timing import (
    Timing,
    TrainerStep,
    matmul_rate,
    peak_memory,
    ratio,
    time_in_turns,
)
from benchmarks.training import dit_step, tokenizer_step
from benchmarks.tricks import tricks
from semtok.commands.cli import Parser
from semtok.commands.evaluate_options import check_output
from semtok.commands.table import print_table
from semtok.errors import UserError
from semtok.sampler.architecture import PRESETS
from semtok.speed import Compiler
from semtok.storage import write_json


def _parser() -> Parser:
    parser = Parser(prog="benchmark", description=__doc__)
    tasks = parser.add_subparsers(dest="task", required=True)
    task = tasks.add_parser("tokenizer", help="a training step of a tokenizer's recipe")
    task.add_argument("recipe", type=Path)
    task.add_argument(
        "--random",
        action="store_true",
        help="random images, and random weights instead of fetched ones; they cost the same",
    )
    _add_settings(task)
    task.set_defaults(command=_tokenizer)
    task = tasks.add_parser("dit", help="a transformer's training step on cached latents")
    _add_network(task)
    _add_settings(task)
    task.set_defaults(command=_dit)
    task = tasks.add_parser("sampling", help="drawing latents with a transformer")
    _add_network(task)
    _add_settings(task)
    task.set_defaults(command=_sampling)
    task = tasks.add_parser(
        "reglue", help="REGLUE's step beside plain PyTorch of the published one"
    )
    task.add_argument("--network", choices=PRESETS, default="SiT-B/2", metavar="PRESET")
    task.add_argument("--batch-size", type=int, default=4)
    _add_settings(task, against=False)
    task.set_defaults(command=_reglue)
    task = tasks.add_parser("tricks", help="what each way of being fast brings here, in turns")
    task.add_argument("--network", choices=PRESETS, default="SiT-B/2", metavar="PRESET")
    task.add_argument("--batch-size", type=int, default=4)
    task.add_argument("--rounds", type=int, default=5)
    task.add_argument("--precision", choices=("fp32", "tf32", "bf16"), default="fp32")
    task.add_argument("--compiler", choices=get_args(Compiler)[1:], default="inductor")
    _add_shared(task)
    task.set_defaults(command=_tricks)
    task = tasks.add_parser(
        "routing", help="what token routing saves in training and in guided sampling, in turns"
    )
    _add_network(task)
    task.add_argument("--precision", choices=("fp32", "tf32", "bf16"), default="fp32")
    _add_settings(task, against=False)
    task.set_defaults(command=_routing)
    task = tasks.add_parser("cache", help="writing and reading cached latents")
    task.add_argument("--num-images", type=int, default=50_000)
    task.add_argument(
        "--num-encoded", type=int, default=16, help="images that the networks encode; more on a GPU"
    )
    task.add_argument(
        "--targets", action="store_true", help="with targets of REPA, 201 kB an image"
    )
    _add_shared(task)
    task.set_defaults(command=_cache)
    task = tasks.add_parser(
        "memory", help="what a recipe's training step needs on a GPU, found without one"
    )
    task.add_argument("recipe", type=Path)
    task.add_argument("overrides", nargs="*", metavar="key=value", help="of the recipe")
    task.add_argument("--latents", choices=PUBLISHED, help="whose shapes, for a generator")
    task.add_argument("--gpu", type=float, default=80, help="GB of the GPU in mind; default: 80")
    _add_shared(task)
    task.set_defaults(command=_memory)
    _add_gpu(tasks.add_parser("gpu", help="what only a GPU can tell, and figures of all stages"))
    return parser


def _add_gpu(task: argparse.ArgumentParser) -> None:
    task.add_argument("--minutes", type=float, default=10, help="after which no part begins")
    task.add_argument("--only", nargs="+", metavar="WORD", help="the parts that have it in a name")
    task.add_argument(
        "--tiny", action="store_true", help="rehearse: smallest sizes, also without a GPU"
    )
    _add_shared(task)
    task.set_defaults(command=_gpu)


def _add_network(task: argparse.ArgumentParser) -> None:
    task.add_argument("--latents", choices=PUBLISHED, default="sit", help="whose shapes")
    task.add_argument("--network", choices=PRESETS, default="SiT-B/2", metavar="PRESET")
    task.add_argument("--batch-size", type=int, default=4)


def _add_settings(task: argparse.ArgumentParser, *, against: bool = True) -> None:
    task.add_argument("overrides", nargs="*", metavar="key=value", help="of the recipe")
    if against:
        task.add_argument(
            "--against",
            nargs="+",
            metavar="key=value",
            help="the other side: these settings instead",
        )
    task.add_argument("--rounds", type=int, default=7, help="of one step each, in turns")
    _add_shared(task)


def _add_shared(task: argparse.ArgumentParser) -> None:
    task.add_argument("--output", type=Path, help="also write the figures as JSON")


def main(arguments: Sequence[str]) -> int:
    """Returns the exit code."""
    args = _parsed(arguments)
    with tempfile.TemporaryDirectory() as folder:
        figures = args.command(args, Path(folder))
    figures |= {
        "torch": torch.__version__,
        "device": _device_name(),
        "threads": torch.get_num_threads(),
    }
    print(f"{figures['device']}, torch {figures['torch']}, {figures['threads']} threads")
    if args.output is not None:
        write_json(args.output, figures)
    return int(any(part["state"] == "failed" for part in figures.get("parts", ())))


def figures_of(words: Sequence[str], folder: Path) -> dict[str, Any]:
    """What the benchmark of these words finds.

    Args:
        folder: for what it writes; empty.
    """
    args = _parsed(words)
    return args.command(args, folder)


def _parsed(arguments: Sequence[str]) -> argparse.Namespace:
    parser = _parser()
    args, rest = parser.parse_known_args(arguments)
    # Settings may stand behind options, where argparse has closed the list already.
    if rest and (not hasattr(args, "overrides") or any(w[0] == "-" or "=" not in w for w in rest)):
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    if rest:
        args.overrides = [*args.overrides, *rest]
    for name in ("batch_size", "rounds", "num_images", "num_encoded"):
        if getattr(args, name, 1) < 1:
            raise UserError(f"--{name.replace('_', '-')} must be at least 1")
    check_output(args)
    return args


def _sides(args: argparse.Namespace) -> dict[str, list[str]]:
    """Settings of each side by a name that tells them apart."""
    if args.against is None:
        return {" ".join(args.overrides) or "as it stands": args.overrides}
    names = (" ".join(args.overrides) or "as it stands", " ".join(args.against))
    if names[0] == names[1]:
        raise UserError("--against: the same settings on both sides")
    return dict(zip(names, (args.overrides, args.against), strict=True))


def _tokenizer(args: argparse.Namespace, folder: Path) -> dict[str, Any]:
    made = {
        name: tokenizer_step(args.recipe, words, folder, random=args.random)
        for name, words in _sides(args).items()
    }
    return _report(f"training step of {args.recipe}", _time_training(made, args.rounds))


def _dit(args: argparse.Namespace, folder: Path) -> dict[str, Any]:
    made = {
        name: dit_step(args.latents, args.network, args.batch_size, words, folder)
        for name, words in _sides(args).items()
    }
    title = f"training step of {args.network} on {args.latents}'s latents, batch {args.batch_size}"
    return _report(title, _time_training(made, args.rounds))


def _time_training(made: dict[str, tuple[TrainerStep, float]], rounds: int) -> list[Timing]:
    seconds = time_in_turns({name: step for name, (step, _) in made.items()}, rounds)
    return [
        Timing(
            name,
            seconds[name],
            step.trainer.config.batch_size,
            flops=flops,
            waits=step.waits,
            precision=step.precision,
        )
        for name, (step, flops) in made.items()
    ]


def _sampling(args: argparse.Namespace, folder: Path) -> dict[str, Any]:
    timings = sampling(args.latents, args.network, args.batch_size, args.rounds, _sides(args))
    title = f"sampling with {args.network} in {args.latents}'s latents, batch {args.batch_size}"
    return _report(title, timings)


def _reglue(args: argparse.Namespace, folder: Path) -> dict[str, Any]:
    paired = reglue_steps(args.network, args.batch_size, args.rounds, args.overrides, folder)
    title = f"REGLUE with {args.network}, 256x256 pixels, batch {args.batch_size}"
    figures = _report(title, [paired.plain, paired.ours])
    shown = ", ".join(f"{name} {value:.2%}" for name, value in paired.losses.items())
    print(f"mean difference of the losses over {args.rounds + 2} steps: {shown}")
    print(f"the published step takes {paired.saved:.2f} times the operations")
    return figures | {"loss_differences": paired.losses, "operations_ratio": paired.saved}


def _tricks(args: argparse.Namespace, folder: Path) -> dict[str, Any]:
    measured = []
    for trick in tricks(
        args.network,
        args.batch_size,
        args.rounds,
        precision=args.precision,
        compiler=args.compiler,
        folder=folder,
    ):
        gains = [a / b for a, b in zip(trick.without, trick.with_it, strict=True)]
        ms = [1e3 * statistics.median(seconds) for seconds in (trick.without, trick.with_it)]
        gain = {"gain": statistics.median(gains), "least": min(gains), "most": max(gains)}
        measured.append({"trick": trick.name, "without_ms": ms[0], "with_ms": ms[1], **gain})
    columns = ["trick", "without, ms", "with, ms", "times as fast", "in rounds"]
    rows = [
        (
            row["trick"],
            *(f"{row[key]:.4g}" for key in ("without_ms", "with_ms")),
            f"{row['gain']:.2f}",
            f"{row['least']:.2f} to {row['most']:.2f}",
        )
        for row in measured
    ]
    title = (
        f"the same work without and with, {args.network}, batch {args.batch_size}, {args.precision}"
    )
    print_table(title, rows, columns)
    return {"title": title, "rows": measured}


def _routing(args: argparse.Namespace, folder: Path) -> dict[str, Any]:
    asked = (args.latents, args.network, args.batch_size)
    measured = []
    for saving in savings(*asked, args.rounds, args.overrides, args.precision):
        pairs = zip(*saving.seconds, strict=True)
        times, fewer = [a / b for a, b in pairs], saving.operations[0] / saving.operations[1]
        row = {"what": saving.name, "gflop": [n / 1e9 for n in saving.operations]}
        row |= {"seconds": [statistics.median(own) for own in saving.seconds]}
        row |= {"times_fewer_operations": fewer, "times_as_fast": statistics.median(times)}
        measured.append(row | {"least": min(times), "most": max(times)})
    columns = ["what", "GFLOP", "times fewer", "seconds", "times as fast", "in rounds"]
    rows = [
        (
            row["what"],
            " to ".join(f"{n:.4g}" for n in row["gflop"]),
            f"{row['times_fewer_operations']:.2f}",
            " to ".join(f"{n:.3g}" for n in row["seconds"]),
            f"{row['times_as_fast']:.2f}",
            f"{row['least']:.2f} to {row['most']:.2f}",
        )
        for row in measured
    ]
    title = f"token routing of {args.network} on {args.latents}'s latents, batch {args.batch_size}"
    print_table(title, rows, columns)
    optimiser = statistics.median(optimiser_seconds(*asked, args.overrides, min(args.rounds, 3)))
    print(f"AdamW's step, with and without routing: {optimiser:.3g} s")
    return {"title": title, "rows": measured, "optimiser_seconds": optimiser}


def _cache(args: argparse.Namespace, folder: Path) -> dict[str, Any]:
    written, read, size = cache_rates(args.num_images, folder / "cache", targets=args.targets)
    encoded = encoding_rate(args.num_encoded, folder / "encoded", targets=args.targets)
    with_targets = " with REPA's targets" if args.targets else ""
    title = f"cached latents of REGLUE{with_targets}, {size / 1e3:.1f} kB an image"
    figures = _report(title, [read, written, encoded], matmul=False)
    share = (written.median / written.images) / (encoded.median / encoded.images)
    print(f"of writing, {100 * share:.2g} % is writing; the rest is networks")
    return figures | {"bytes_per_image": size, "share_of_writing": share}


def _memory(args: argparse.Namespace, folder: Path) -> dict[str, Any]:
    if not args.gpu > 0:
        raise UserError("--gpu must be more than 0")
    estimate = recipe_memory(args.recipe, args.overrides, args.latents, folder)
    rows = [(name, f"{value:.3g} GB") for name, value in vars(estimate).items()]
    print_table(f"a training step of {args.recipe}", [*rows, ("fixed", f"{estimate.fixed:.3g} GB")])
    block = estimate.block(args.gpu)
    print(
        f"  memory: {{gpu: {block.gpu:g}, fixed: {block.fixed:g}, per_image: {block.per_image:g}}}"
    )
    return {**vars(estimate), "memory": block.model_dump()}


def _gpu(args: argparse.Namespace, folder: Path) -> dict[str, Any]:
    from benchmarks.gpu.first_minutes import chosen, first_minutes  # late: it uses this module

    if not args.minutes > 0:
        raise UserError("--minutes must be more than 0")
    parts = chosen(args.only)
    return first_minutes(parts, args.minutes, folder, args.output, tiny=args.tiny)


def _report(title: str, timings: list[Timing], *, matmul: bool = True) -> dict[str, Any]:
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    peak = peak_memory(device)  # before the matrix products, which need some too
    precisions = {timing.precision for timing in timings} if matmul else set()
    rates = {precision: matmul_rate(device, precision) for precision in sorted(precisions)}
    rows = [timing.row(rates) for timing in timings]
    columns = [name for name in rows[0] if any(row[name] is not None for row in rows)]
    shown = [tuple(_shown(name, row[name]) for name in columns) for row in rows]
    print_table(title, shown, columns)
    figures: dict[str, Any] = {"title": title, "rows": rows, "peak_memory_gb": peak}
    figures["matmul_gflops"] = {name: rate / 1e9 for name, rate in rates.items()}
    for name, rate in figures["matmul_gflops"].items():
        print(f"matrix product in {name}: {rate:.0f} GFLOP/s")
    print(f"peak memory of all of this: {figures['peak_memory_gb']:.1f} GB")
    if len(timings) == 2 and matmul:
        figures["ratio"] = ratio(*timings)
        print(figures["ratio"])
    return figures


def _shown(name: str, value: Any) -> str:
    if value is None:
        return "-"
    if name in ("of matmul", "waiting for data"):
        return f"{value:.0%}"
    return value if isinstance(value, str) else f"{value:.4g}"


def _device_name() -> str:
    return torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"
