"""A transformer that processes share out learns as whole ones do, and any number of them reads its checkpoints."""

import json
import os
import pickle
import shutil
import signal
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from torch.distributed.checkpoint.metadata import Metadata

import processes
import tiny
from processes import Ranks
from semtok.commands import train_dit, train_tokenizer
from semtok.commands.cli import run
from semtok.commands.export_checkpoint import kept_checkpoint
from semtok.errors import Interrupted, UserError
from semtok.recipe import parse_diffusion_recipe, parse_recipe
from semtok.storage import read_tensors
from semtok.training.checkpoint import list_checkpoints, read_networks
from semtok.training.loop import Trainer
from semtok.training.process import check_launch, make_accelerator
from semtok.training.sharded_checkpoint import _Reader, _Writer
from semtok.unfinished import is_unfinished
from test_distributed import METHODS

SHARED = "train.sharding=fsdp2"


def train(ranks: Ranks, *words: str, name: str = "train_dit") -> str:
    """What the first of the processes printed."""
    return ranks.command(name, words)[0]


def newest(run: Path) -> Path:
    return list_checkpoints(run / "checkpoints")[-1]


def is_in_parts(run: Path) -> bool:
    return not (newest(run) / "model.safetensors").exists()


def assert_close(ours: Path, theirs: Path) -> None:
    """That two runs have come to the same networks and averages, and export the same."""
    pairs = [[read_networks(newest(each)) for each in (ours, theirs)]]
    for file in ("network.safetensors", "vae/diffusion_pytorch_model.safetensors"):
        if (ours / "export" / file).is_file():
            pairs.append([read_tensors(each / "export" / file) for each in (ours, theirs)])
    assert len(pairs) == 2
    for one, other in pairs:
        assert one.keys() == other.keys()
        for key in one:
            torch.testing.assert_close(one[key], other[key], atol=1e-5, rtol=0)


def norms_of_gradients(run: Path) -> list[float]:
    rows = map(json.loads, (run / "metrics.jsonl").open())
    return [row["grad_norm/dit"] for row in rows]


def stopped_at(step: int, run: Path, copy: Path) -> Path:
    """A copy of a run as it was when it had just written that checkpoint."""
    shutil.copytree(run, copy)
    for checkpoint in list_checkpoints(copy / "checkpoints"):
        if checkpoint.name > f"step_{step:08d}":
            shutil.rmtree(checkpoint)
    return copy


def content(folder: Path, **train: Any) -> dict[str, Any]:
    """Of a transformer on an untrained VAE's latents, of sizes that processes can't share out evenly."""
    if not (folder / "tokenizer").is_dir():
        objective = tiny.build({"name": "vae"})
        tokenizer = objective.tokenizer(objective.averaged_module())
        tokenizer.measure_statistics([torch.rand(8, 3, 16, 16) * 2 - 1])
        tokenizer.save_pretrained(folder / "tokenizer")
    whole = tiny.content(schedule="constant", **train)
    content = {key: whole[key] for key in ("data", "train")}
    content["train"]["optimiser"] = {"learning_rate": 1e-4}
    shape = {"depth": 2, "width": 36, "heads": 3, "learned_positions": [2, 2]}
    content["diffusion"], content["sampler"] = {"network": shape}, {"steps": 2}
    return content | {"tokenizer": str(folder / "tokenizer")}


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory, ranks: Ranks) -> Path:
    """The same 20 steps of two processes, in ``whole`` and ``shared``, each with its checkpoints of step 10 and 20."""
    root = tmp_path_factory.mktemp("runs")
    recipe = root / "recipe.yaml"
    recipe.write_text(yaml.safe_dump(content(root, steps=20, checkpoint_every=10)))
    for name, words in {"whole": [], "shared": [SHARED]}.items():
        train(ranks, "--recipe", str(recipe), "--output", str(root / name), *words)
    return root


def test_two_processes_learn_as_with_whole_networks_and_hold_a_part_each(runs):
    assert_close(runs / "shared", runs / "whole")
    norms = [norms_of_gradients(runs / name) for name in ("shared", "whole")]
    assert len(norms[0]) == 10 and norms[0] == pytest.approx(norms[1], rel=1e-4)
    parts = {file.name: file.stat().st_size for file in newest(runs / "shared").glob("*.distcp")}
    first, second = parts["__0_0.distcp"], parts["__1_0.distcp"]
    assert 0.8 < first / second < 1.25, parts
    assert is_in_parts(runs / "shared") and not is_in_parts(runs / "whole")


def test_a_run_goes_on_in_one_process(runs, tmp_path):
    copy = stopped_at(10, runs / "shared", tmp_path / "one")
    assert run(train_dit.main, ["--resume", "--output", str(copy)]) == 0
    assert is_in_parts(copy)
    assert_close(copy, runs / "whole")


@pytest.mark.long
def test_a_run_goes_on_in_four_processes(runs, tmp_path):
    copy = stopped_at(10, runs / "shared", tmp_path / "four")
    words = ["-m", "semtok_cli", "train_dit", "--resume", "--output", str(copy)]
    outputs = processes.succeed(words, tmp_path, num=4, seconds=500)
    assert "resuming after step 10" in outputs[0]
    assert len(list(newest(copy).glob("*.distcp"))) == 4
    assert_close(copy, runs / "whole")


@pytest.mark.long
def test_a_run_of_whole_networks_goes_on_shared_out_and_back(runs, ranks, tmp_path):
    copy = stopped_at(10, runs / "whole", tmp_path / "to_parts")
    train(ranks, "--resume", "--output", str(copy), SHARED)
    assert_close(copy, runs / "shared")
    copy = stopped_at(10, runs / "shared", tmp_path / "to_whole")
    assert run(train_dit.main, ["--resume", "--output", str(copy), "train.sharding=none"]) == 0
    assert not is_in_parts(copy)
    assert_close(copy, runs / "shared")


def test_a_checkpoint_in_parts_is_exported(runs, tmp_path):
    kept_checkpoint(str(runs / "shared"), None).export(None, tmp_path / "export")
    ours, theirs = (
        read_tensors(folder / "export" / "network.safetensors")
        for folder in (tmp_path, runs / "shared")
    )
    assert all(torch.equal(ours[key], theirs[key]) for key in theirs)


def test_a_vae_is_trained_with_a_transformer_that_is_shared_out(tmp_path, ranks):
    recipe = tmp_path / "recipe.yaml"
    joint = tiny.content(METHODS["repae"], steps=3, schedule="constant", accumulate=2)
    joint["train"]["optimiser"] = {"learning_rate": 1e-4}
    recipe.write_text(yaml.safe_dump(joint))
    for name, words in {"whole": [], "shared": [SHARED]}.items():
        words = [str(recipe), "--output", str(tmp_path / name), *words]
        train(ranks, *words, name="train_tokenizer")
    assert_close(tmp_path / "shared", tmp_path / "whole")


# In one process, which writes the same checkpoints --------------------------------------------------


def trainer(folder: Path, **settings: Any) -> Trainer:
    settings = {"steps": 4, "checkpoint_every": 2, "sharding": "fsdp2", "log_every": 1} | settings
    return tiny.trainer(folder, METHODS["repae"], schedule="constant", **settings)


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("undisturbed") / "run"
    trainer(folder).run()
    return folder


def assert_equal(ours: Path, theirs: Path) -> None:
    one, other = (read_networks(newest(each)) for each in (ours, theirs))
    assert one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one)


def test_training_goes_on_while_parts_are_written_and_they_are_of_their_step(
    tmp_path, monkeypatch, undisturbed
):
    """Nothing is written before the next step is done."""
    training, is_on = trainer(tmp_path / "run"), threading.Event()
    write, step = _Writer.write_data, training.train_step
    waited = []

    def write_later(self, *arguments):
        waited.append(is_on.wait(60) if training.step < 4 else True)
        return write(self, *arguments)

    def step_and_tell(batches):
        step(batches)
        if training.step == 3:
            is_on.set()

    monkeypatch.setattr(_Writer, "write_data", write_later)
    monkeypatch.setattr(training, "train_step", step_and_tell)
    training.run()
    assert waited == [True, True]
    checkpoints = list_checkpoints(tmp_path / "run" / "checkpoints")
    assert [path.name for path in checkpoints] == ["step_00000002", "step_00000004"]
    shutil.rmtree(checkpoints[-1])
    again = trainer(tmp_path / "run")
    again.resume()
    assert again.step == 2
    again.run()
    assert_equal(tmp_path / "run", undisturbed)


def test_a_run_that_is_killed_while_it_writes_goes_on_from_the_checkpoint_before(
    tmp_path, monkeypatch, undisturbed
):
    """What is on the disk before the last part is told of is what a kill leaves."""
    finish, run, killed = _Writer.finish, tmp_path / "run", tmp_path / "killed"

    def keep_what_is_there(self, metadata, results):
        if self._path.name == "step_00000004":
            shutil.copytree(run, killed)
        finish(self, metadata, results)

    monkeypatch.setattr(_Writer, "finish", keep_what_is_there)
    trainer(run).run()
    monkeypatch.undo()
    unfinished, whole = sorted(path.name for path in (killed / "checkpoints").iterdir())
    assert is_unfinished(unfinished) and whole == "step_00000002"
    again = trainer(killed)
    again.resume()
    assert again.step == 2
    again.run()
    assert_equal(killed, undisturbed)
    left = sorted(path.name for path in (killed / "checkpoints").iterdir())
    assert left == ["step_00000002", "step_00000004"], "nothing unfinished stays"


def test_a_checkpoint_that_can_t_be_written_ends_the_run_and_leaves_the_one_before(
    tmp_path, monkeypatch
):
    finish = _Writer.finish

    def fail(self, metadata, results):
        if self._path.name == "step_00000004":
            raise OSError(28, "No space left on device", str(self._path))
        finish(self, metadata, results)

    monkeypatch.setattr(_Writer, "finish", fail)
    with pytest.raises(OSError, match="No space left"):
        trainer(tmp_path / "run", keep_last=1).run()
    assert [p.name for p in list_checkpoints(tmp_path / "run/checkpoints")] == ["step_00000002"]


def test_a_signal_waits_for_the_checkpoint_and_old_ones_go(tmp_path, monkeypatch):
    training = trainer(tmp_path / "run", steps=9, checkpoint_every=1, keep_last=2)
    step = training.train_step

    def step_and_stop(batches):
        step(batches)
        if training.step == 3:
            os.kill(os.getpid(), signal.SIGUSR1)

    monkeypatch.setattr(training, "train_step", step_and_stop)
    with pytest.raises(Interrupted) as stopped:
        training.run()
    assert stopped.value.checkpoint == newest(tmp_path / "run")
    kept = sorted(path.name for path in (tmp_path / "run" / "checkpoints").iterdir())
    assert kept == ["step_00000002", "step_00000003"]


# What is refused -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        ({"precision": "fp16"}, "train.precision: fp16 does not go with train.sharding=fsdp2"),
        ({"channels_last": True}, "train.channels_last does not go with train.sharding=fsdp2"),
        ({"averages": {"every": 2}}, "train.averages does not go with train.sharding=fsdp2"),
        ({"optimiser": {"name": "muon", "learning_rate": 1e-3}}, "train.sharding: muon"),
        ({"network": {"value_residual": True, "depth": 2}}, "train.sharding: .*first_share"),
    ],
)
def test_what_needs_networks_whole_is_refused_by_name(settings, told, tmp_path):
    recipe = content(tmp_path, sharding="fsdp2")
    recipe["diffusion"]["network"] |= settings.pop("network", {})
    recipe["train"] |= settings
    with pytest.raises(UserError, match=told) as error:
        parsed = parse_diffusion_recipe(recipe, "tiny")
        train_dit.plan_dit(parsed, tmp_path / "run", resume=False, place="tiny")
    assert "\n" not in str(error.value)


def test_a_method_without_a_transformer_is_refused_by_name(tmp_path):
    recipe = parse_recipe(tiny.content({"name": "vae"}, sharding="fsdp2"), "tiny")
    with pytest.raises(UserError, match="train.sharding: fsdp2 shares out diffusion transformers"):
        train_tokenizer.plan_tokenizer(recipe, tmp_path / "run", resume=False, place="tiny")


@pytest.mark.parametrize(
    ("variable", "value"),
    [
        ("FSDP_VERSION", "1"),
        ("FSDP_OFFLOAD_PARAMS", "true"),
        ("FSDP_RESHARD_AFTER_FORWARD", "false"),
        ("FSDP_AUTO_WRAP_POLICY", "SIZE_BASED_WRAP"),
        ("FSDP_ACTIVATION_CHECKPOINTING", "true"),
    ],
)
def test_what_a_launcher_asks_of_fsdp_otherwise_is_refused_by_name(variable, value, monkeypatch):
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    monkeypatch.setenv("FSDP_VERSION", "2")
    monkeypatch.setenv(variable, value)
    config = parse_recipe(tiny.content(METHODS["repae"], sharding="fsdp2"), "tiny").train
    with pytest.raises(UserError, match=f"^{variable}: {value} is not as train.sharding=fsdp2"):
        check_launch(config)


def test_a_launcher_that_asks_for_the_same_is_heard(monkeypatch, tmp_path):
    for name, value in {"VERSION": "2", "OFFLOAD_PARAMS": "false"}.items():
        monkeypatch.setenv(f"FSDP_{name}", value)
    monkeypatch.setenv("FSDP_RESHARD_AFTER_FORWARD", "true")
    monkeypatch.setenv("FSDP_CPU_RAM_EFFICIENT_LOADING", "true")
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    config = parse_recipe(tiny.content(METHODS["repae"], sharding="fsdp2"), "tiny").train
    accelerator = make_accelerator(config, tmp_path)
    assert accelerator.distributed_type.value == "NO" and os.environ["ACCELERATE_USE_FSDP"]


class _Calls:
    def __reduce__(self) -> tuple[Any, tuple[str]]:
        return os.system, ("touch it_ran",)


@pytest.mark.parametrize("damage", ["hostile", "cut"])
def test_a_list_of_parts_runs_nothing_and_damage_is_told(
    damage, tmp_path, monkeypatch, undisturbed
):
    monkeypatch.chdir(tmp_path)
    shutil.copytree(undisturbed, tmp_path / "run")
    file = newest(tmp_path / "run") / ".metadata"
    file.write_bytes(pickle.dumps(_Calls()) if damage == "hostile" else file.read_bytes()[:90])
    with pytest.raises(UserError, match="step_00000004: cut short or damaged .*; delete") as error:
        trainer(tmp_path / "run").resume()
    assert "\n" not in str(error.value) and not (tmp_path / "it_ran").exists()


def _forget_parts(metadata: Metadata, name: str) -> None:
    metadata.state_dict_metadata[name].chunks.pop()


def _make_huge(metadata: Metadata, name: str) -> None:
    about = metadata.state_dict_metadata[name]
    about.size = about.chunks[0].sizes = torch.Size([10**14])


def _take_properties(metadata: Metadata, name: str) -> None:
    metadata.state_dict_metadata[name].properties = None


def _name_it_by_a_number(metadata: Metadata, name: str) -> None:
    metadata.state_dict_metadata[5] = metadata.state_dict_metadata[name]


def _add_to_no_optimiser(metadata: Metadata, name: str) -> None:
    metadata.state_dict_metadata["optimisers.dit"] = metadata.state_dict_metadata[name]


@pytest.mark.parametrize(
    "damage",
    [_forget_parts, _make_huge, _take_properties, _name_it_by_a_number, _add_to_no_optimiser],
)
def test_a_list_that_tells_of_no_whole_tensors_is_refused_in_one_line(
    damage, tmp_path, undisturbed
):
    checkpoint = shutil.copytree(newest(undisturbed), tmp_path / "step_00000004")
    file = checkpoint / ".metadata"
    metadata = _Reader(checkpoint).read_metadata()
    damage(metadata, next(n for n in metadata.state_dict_metadata if n.startswith("learners.")))
    file.write_bytes(pickle.dumps(metadata))
    with pytest.raises(UserError, match="step_00000004: cut short or damaged") as error:
        read_networks(checkpoint)
    assert "\n" not in str(error.value)


def test_a_part_that_is_no_tensor_is_refused_without_torch_s_advice_to_trust_it(
    tmp_path, undisturbed
):
    checkpoint = shutil.copytree(newest(undisturbed), tmp_path / "step_00000004")
    part = checkpoint / "__0_0.distcp"
    part.write_bytes(bytes(part.stat().st_size))
    with pytest.raises(UserError, match=r"damaged \(a part holds no tensor\)"):
        read_networks(checkpoint)
