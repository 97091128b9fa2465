"""Runs exported pipelines in a process of its own, in which semtok can't be imported.

``python pipeline_process.py CALLS RESULTS``: calls and what became of each, by name, both as torch saves them.
"""

import sys
from importlib.abc import MetaPathFinder
from typing import Any

_HIDDEN = {
    "semtok",
    "transformers",
}  # the second takes seconds to import and is not asked for either


class Hide(MetaPathFinder):
    """Refuses to find some packages."""

    def find_spec(self, name: str, *_: object) -> None:
        if name.partition(".")[0] in _HIDDEN:
            raise ModuleNotFoundError(f"No module named '{name}'", name=name)


sys.meta_path.insert(0, Hide())
sys.modules |= dict.fromkeys(_HIDDEN)  # type: ignore[arg-type]

import numpy as np  # noqa: E402
import torch  # noqa: E402
from diffusers import DiffusionPipeline  # noqa: E402

_pipelines: dict[str, DiffusionPipeline] = {}


def load(reference: str, **options: Any) -> DiffusionPipeline:
    """A pipeline, once."""
    key = f"{reference} {sorted(options.items())}"
    if key not in _pipelines:
        _pipelines[key] = DiffusionPipeline.from_pretrained(
            reference, trust_remote_code=True, **options
        )
    return _pipelines[key]


def answer(call: dict[str, Any]) -> Any:
    """Images of one call as tensors, or what its code has left in ``images``."""
    if "code" in call:
        names: dict[str, Any] = {}
        exec(call["code"], names)
        images = names["images"]
    else:
        pipeline = load(call["folder"], **call.get("options", {}))
        if "sampler" in call:
            config = pipeline.scheduler.config
            pipeline.scheduler = type(pipeline.scheduler).from_config(
                config, sampler=config.sampler | call["sampler"]
            )
        images = pipeline(**{"output_type": "pt"} | call["arguments"]).images
    if isinstance(images, list):
        return torch.stack([torch.from_numpy(np.array(image)) for image in images])
    return torch.from_numpy(images) if isinstance(images, np.ndarray) else images


def main(calls_file: str, results_file: str) -> None:
    """Answers each call, or says why not."""
    calls = torch.load(calls_file, weights_only=True)
    # All are loaded first, so that each runs beside code that was loaded after its own.
    for call in calls.values():
        if "folder" in call:
            load(call["folder"], **call.get("options", {}))
    results = {}
    for name, call in calls.items():
        try:
            results[name] = answer(call)
        except ValueError as error:
            results[name] = str(error)
    torch.save(results, results_file)


if __name__ == "__main__":
    main(*sys.argv[1:])
