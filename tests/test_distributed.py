"""Two processes are one process with the same global batch."""

import os
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml

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


def launch(arguments: list[str], num_processes: int) -> list[str]:
    """Runs ``python arguments`` in that many processes, as torchrun would; returns what they print."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    processes = []
    for rank in range(num_processes):
        environment = os.environ | {"OMP_NUM_THREADS": "1"}
        if num_processes > 1:
            environment |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
            environment |= {"RANK": str(rank), "LOCAL_RANK": str(rank)}
            environment |= {"WORLD_SIZE": str(num_processes)}
        processes.append(
            subprocess.Popen(
                [sys.executable, *arguments],
                env=environment,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
            )
        )
    outputs = [process.communicate(timeout=240)[0] for process in processes]
    assert all(process.returncode == 0 for process in processes), "\n".join(outputs)
    return outputs


@pytest.mark.parametrize("name", METHODS)
def test_two_gloo_processes_train_to_the_weights_of_one(name, tmp_path):
    recipe = tmp_path / "recipe.yaml"
    content = tiny.content(METHODS[name], steps=3, schedule="constant", log_every=1)
    # Adam divides by the gradient's size, so rounding of tiny gradients would show as whole steps.
    content["train"]["optimiser"] = {"learning_rate": 1e-4}
    recipe.write_text(yaml.safe_dump(content))
    command = ["-m", "semtok.commands.cli", "train_tokenizer", str(recipe), "--output"]
    assert run(train_tokenizer.main, [str(recipe), "--output", str(tmp_path / "one")]) == 0
    outputs = launch([*command, str(tmp_path / "two")], 2)
    assert "training" in outputs[0] and "training" not in outputs[1], "one process speaks"

    one, two = tiny.final_tensors(tmp_path / "one"), tiny.final_tensors(tmp_path / "two")
    assert one.keys() == two.keys()
    for key in (k for k in one if k.startswith(("players.", "ema."))):
        torch.testing.assert_close(
            one[key], two[key], atol=2e-5, rtol=1e-3, msg=lambda text, key=key: f"{key}: {text}"
        )


def test_two_processes_measure_the_features_of_all_and_share_a_cache(tmp_path):
    recipe = tmp_path / "recipe.yaml"
    method = {"name": "reglue", "compressor": {"hidden": [8]}}
    method["feature_cache"] = str(tmp_path / "cache")
    recipe.write_text(yaml.safe_dump(tiny.content(method, num_statistics_images=10, steps=2)))
    command = ["-m", "semtok.commands.cli", "train_tokenizer", str(recipe), "--output"]
    launch([*command, str(tmp_path / "two")], 2)
    # One process reads the cache that two have written.
    assert run(train_tokenizer.main, [str(recipe), "--output", str(tmp_path / "one")]) == 0
    one, two = (Tokenizer.from_pretrained(tmp_path / name).coder for name in ("one", "two"))
    for name in ("feature_mean", "feature_std"):
        torch.testing.assert_close(getattr(one, name), getattr(two, name), atol=1e-4, rtol=1e-4)


def test_the_two_processes_hold_equal_weights(tmp_path):
    script = tmp_path / "script.py"
    script.write_text(
        "import sys, torch, torch.distributed as dist\n"
        f"sys.path.insert(0, {str(Path(tiny.__file__).parent)!r})\n"
        "import tiny\n"
        "from pathlib import Path\n"
        "from semtok.data.sources import open_sources\n"
        "from semtok.recipe import parse_recipe\n"
        "from semtok.training.loop import Trainer\n"
        "from semtok.training.process import make_accelerator\n"
        f"method = {METHODS['send_vae_gan']!r}\n"
        "recipe = parse_recipe(tiny.content(method, steps=3), 'tiny')\n"
        "accelerator = make_accelerator(recipe.train, Path(sys.argv[1]))\n"
        "Path(sys.argv[1]).mkdir(exist_ok=True)\n"
        "train, held_out = open_sources(recipe.data)\n"
        "trainer = Trainer(tiny.build(method), recipe.train, accelerator=accelerator,"
        " folder=Path(sys.argv[1]), source=train, validation=held_out, num_workers=0, tracked={})\n"
        "trainer.run()\n"
        "flat = torch.cat([p.detach().flatten() for p in trainer.objective.players.parameters()])\n"
        "both = [torch.empty_like(flat) for _ in range(2)]; dist.all_gather(both, flat)\n"
        "assert torch.equal(both[0], both[1])\n"
        "metrics = trainer.validate(); values = [None, None]\n"
        "dist.all_gather_object(values, metrics); assert values[0] == values[1]\n"
        "dist.barrier(); dist.destroy_process_group()\n"  # threads left at exit would abort it
    )
    launch([str(script), str(tmp_path / "run")], 2)


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
    launch(["-m", "semtok.commands.cli", "train_dit", *arguments, str(tmp_path / "two")], 2)
    one, two = tiny.final_tensors(tmp_path / "one"), tiny.final_tensors(tmp_path / "two")
    for key in (k for k in one if k.startswith(("players.", "ema."))):
        torch.testing.assert_close(one[key], two[key], atol=2e-5, rtol=1e-3)

    arguments = [str(tmp_path / "one"), "--num", "5", "--batch-size", "2", "--output"]
    assert run(sample.main, [*arguments, str(tmp_path / "one.npz")]) == 0
    launch(["-m", "semtok.commands.cli", "sample", *arguments, str(tmp_path / "two.npz")], 2)
    images = [np.load(tmp_path / f"{name}.npz") for name in ("one", "two")]
    assert images[0]["arr_0"].shape == (5, 16, 16, 3)
    assert all(np.array_equal(images[0][k], images[1][k]) for k in ("arr_0", "arr_1"))


def test_two_processes_train_a_missing_tokenizer_together_first(tmp_path):
    recipe = tmp_path / "embedded.yaml"
    recipe.write_text(yaml.safe_dump(tiny.content({"name": "vae"}, steps=2)))
    content = {key: tiny.content(steps=2)[key] for key in ("data", "train")}
    content["diffusion"] = {"network": {"depth": 1, "width": 32, "heads": 2}}
    (tmp_path / "dit.yaml").write_text(yaml.safe_dump(content | {"tokenizer": "embedded"}))
    script = tmp_path / "script.py"
    script.write_text(
        "import os, sys\n"
        "from pathlib import Path\n"
        "from semtok.commands import train_dit, train_tokenizer\n"
        "from semtok.commands.cli import run\n"
        f"os.chdir({str(tmp_path)!r})\n"
        f"train_tokenizer.find_recipe = lambda name: Path({str(recipe)!r})\n"
        "sys.exit(run(train_dit.main, ['--recipe', 'dit.yaml', '--output', 'runs/dit']))\n"
    )
    outputs = launch([str(script)], 2)
    assert "not trained yet: training" in outputs[0]
    assert (tmp_path / "runs/dit/export/config.json").is_file()
