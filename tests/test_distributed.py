"""Two processes are one process with the same global batch."""

import multiprocessing
import os
import socket
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
import yaml
from accelerate.state import AcceleratorState

import tiny
from semtok import Tokenizer
from semtok.commands import sample, train_dit, train_tokenizer
from semtok.commands.cli import run

METHODS = {
    "send_vae_gan": {
        "perceptual": "teacher",
        "adversarial": {**tiny.ADVERSARIAL, "norm": "group", "weight": 0.5},
    },
    "semvae": {"name": "semvae", "channels": 4, "width": 16, "heads": 2, "blocks": 1},
}


def launch(work: Callable[[], int], output: Path) -> list[str]:
    """Does work in two processes, as torchrun would start them; returns what they print.

    They are forked from this one, which has imported everything already.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    files = [output.with_suffix(f".{rank}.log") for rank in range(2)]
    context = multiprocessing.get_context("fork")
    processes = [context.Process(target=_rank, args=(work, r, port, files[r])) for r in range(2)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(240)
    outputs = [file.read_text() for file in files]
    assert [process.exitcode for process in processes] == [0, 0], "\n".join(outputs)
    return outputs


def _rank(work: Callable[[], int], rank: int, port: int, output: Path) -> None:
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": "2"}
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank)}
    AcceleratorState._reset_state(True)  # this process's alone
    with output.open("w", buffering=1) as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
        sys.stdout = sys.stderr = file
        code = 1
        try:
            code = work()
        except BaseException:
            traceback.print_exc()
        file.flush()
    os._exit(code)


@pytest.mark.parametrize("name", METHODS)
def test_two_gloo_processes_train_to_the_weights_of_one(name, tmp_path):
    recipe = tmp_path / "recipe.yaml"
    content = tiny.content(METHODS[name], steps=3, schedule="constant", log_every=1)
    # Adam divides by the gradient's size, so rounding of tiny gradients would show as whole steps.
    content["train"]["optimiser"] = {"learning_rate": 1e-4}
    recipe.write_text(yaml.safe_dump(content))

    def train(name: str) -> int:
        return run(train_tokenizer.main, [str(recipe), "--output", str(tmp_path / name)])

    assert train("one") == 0
    outputs = launch(lambda: train("two"), tmp_path / "two")
    assert "training" in outputs[0] and "training" not in outputs[1], "one process speaks"

    one, two = tiny.final_tensors(tmp_path / "one"), tiny.final_tensors(tmp_path / "two")
    assert one.keys() == two.keys()
    for key in (k for k in one if k.startswith(("learners.", "ema."))):
        torch.testing.assert_close(
            one[key], two[key], atol=2e-5, rtol=1e-3, msg=lambda text, key=key: f"{key}: {text}"
        )


def test_two_processes_measure_the_features_of_all_and_share_a_cache(tmp_path):
    recipe = tmp_path / "recipe.yaml"
    method = {"name": "reglue", "compressor": {"hidden": [8]}}
    method["feature_cache"] = str(tmp_path / "cache")
    recipe.write_text(yaml.safe_dump(tiny.content(method, num_statistics_images=10, steps=2)))

    def train(name: str) -> int:
        return run(train_tokenizer.main, [str(recipe), "--output", str(tmp_path / name)])

    launch(lambda: train("two"), tmp_path / "two")
    # One process reads the cache that two have written.
    assert train("one") == 0
    one, two = (Tokenizer.from_pretrained(tmp_path / name).coder for name in ("one", "two"))
    for name in ("feature_mean", "feature_std"):
        torch.testing.assert_close(getattr(one, name), getattr(two, name), atol=1e-4, rtol=1e-4)


def test_the_two_processes_hold_equal_weights(tmp_path):
    def check() -> int:
        trainer = tiny.trainer(tmp_path / "run", METHODS["send_vae_gan"], steps=3)
        trainer.run()
        flat = torch.cat([p.detach().flatten() for p in trainer.objective.learners.parameters()])
        both = [torch.empty_like(flat) for _ in range(2)]
        dist.all_gather(both, flat)
        metrics: list[Any] = [None, None]
        dist.all_gather_object(metrics, trainer.validate())
        dist.barrier()
        return 0 if torch.equal(*both) and metrics[0] == metrics[1] else 1

    launch(check, tmp_path / "check")


def test_a_generator_too_and_its_samples_are_the_same(tmp_path):
    objective = tiny.build({"name": "vae"})
    tokenizer = objective.tokenizer(objective.averaged_module())
    tokenizer.measure_statistics([torch.rand(8, 3, 16, 16) * 2 - 1])
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    recipe = tmp_path / "recipe.yaml"
    content = tiny.content(steps=3, schedule="constant", log_every=1)
    content = {key: content[key] for key in ("data", "train")}
    content["train"]["optimiser"] = {"learning_rate": 1e-4}
    content["tokenizer"] = str(tmp_path / "tokenizer")
    content["diffusion"] = {"network": {"depth": 2, "width": 32, "heads": 2}}
    content["sampler"] = {"steps": 2, "method": "sde"}
    recipe.write_text(yaml.safe_dump(content))
    arguments = ["--recipe", str(recipe), "--output"]
    assert run(train_dit.main, [*arguments, str(tmp_path / "one")]) == 0
    launch(lambda: run(train_dit.main, [*arguments, str(tmp_path / "two")]), tmp_path / "two")
    one, two = tiny.final_tensors(tmp_path / "one"), tiny.final_tensors(tmp_path / "two")
    for key in (k for k in one if k.startswith(("learners.", "ema."))):
        torch.testing.assert_close(one[key], two[key], atol=2e-5, rtol=1e-3)

    words = [str(tmp_path / "one"), "--num", "5", "--batch-size", "2", "--output"]
    assert run(sample.main, [*words, str(tmp_path / "one.npz")]) == 0
    launch(lambda: run(sample.main, [*words, str(tmp_path / "two.npz")]), tmp_path / "samples")
    images = [np.load(tmp_path / f"{name}.npz") for name in ("one", "two")]
    assert images[0]["arr_0"].shape == (5, 16, 16, 3)
    assert all(np.array_equal(images[0][k], images[1][k]) for k in ("arr_0", "arr_1"))


def test_two_processes_train_a_missing_tokenizer_together_first(tmp_path):
    recipe = tmp_path / "embedded.yaml"
    recipe.write_text(yaml.safe_dump(tiny.content({"name": "vae"}, steps=2)))
    content = {key: tiny.content(steps=2)[key] for key in ("data", "train")}
    content["diffusion"] = {"network": {"depth": 1, "width": 32, "heads": 2}}
    (tmp_path / "dit.yaml").write_text(yaml.safe_dump(content | {"tokenizer": "embedded"}))

    def train() -> int:
        os.chdir(tmp_path)
        train_tokenizer.find_recipe = lambda name: recipe
        return run(train_dit.main, ["--recipe", "dit.yaml", "--output", "runs/dit"])

    outputs = launch(train, tmp_path / "two")
    assert "not trained yet: training" in outputs[0]
    assert (tmp_path / "runs/dit/export/config.json").is_file()
