"""``evaluate reconstruction …``, ``transfer …``, ``latents …``, ``components …``, ``probe …``, ``generation …``,
``classes …``: how good tokenizers and generators are."""

from collections.abc import Sequence

from semtok import stopping
from semtok.commands import evaluate_classes as classes
from semtok.commands import evaluate_components as components
from semtok.commands import evaluate_generation as generation
from semtok.commands import evaluate_predictors as predictors
from semtok.commands import evaluate_probe as probe
from semtok.commands import evaluate_reconstruction as reconstruction
from semtok.commands import evaluate_transfer as transfer
from semtok.commands.cli import Parser
from semtok.commands.evaluate_options import check_one_process, device
from semtok.registry import load_plugins
from semtok.speed import computing
from semtok.storage import write_json


def main(arguments: Sequence[str]) -> int:
    """Returns the exit code."""
    parser = Parser(prog="evaluate", description=__doc__)
    tasks = parser.add_subparsers(dest="task", required=True)
    for task in (reconstruction, transfer, predictors, components, probe, generation, classes):
        task.add_task(tasks)
    args = parser.parse_args(arguments)
    check_one_process()
    load_plugins(args.plugin)
    # PyTorch would compute convolutions on a GPU as TF32.
    way_on = "nothing was written; the same command begins anew"
    with computing(device(), "fp32"), stopping.with_way_on(way_on):
        scores = args.command(args)
    if args.output is not None:
        write_json(args.output, scores)
    return 0
