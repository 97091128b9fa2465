"""The launchers of docs/clusters.md start two processes, which train one run together."""

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

import tiny

ROOT = Path(__file__).parents[1]
TORCHRUN = ["torchrun", "--nproc-per-node", "2", "--master-port", "PORT", "--"]
ACCELERATE = ["accelerate", "launch", "--multi_gpu", "--num_processes", "2"]
ACCELERATE += ["--main_process_port", "PORT"]


def test_two_processes_of_torchrun_train_one_run(tmp_path):
    run = tmp_path / "run"
    said = launched(TORCHRUN, words_of(tmp_path, "--output", str(run)), tmp_path)
    assert said.count("training vae on") == 1
    assert summary_of(run) == (2, 2)


@pytest.mark.long
def test_those_of_accelerate_go_on_where_those_of_torchrun_stopped(tmp_path):
    run = tmp_path / "run"
    words = words_of(tmp_path, "--output", str(run), "--resume", "auto")
    for launcher, steps in ((TORCHRUN, 2), (ACCELERATE, 4)):
        said = launched(launcher, [*words, f"train.steps={steps}"], tmp_path)
        assert said.count("training vae on") == 1
        assert summary_of(run) == (2, steps)


def words_of(folder: Path, *options: str) -> list[str]:
    """A tiny recipe and options."""
    recipe = folder / "recipe.yaml"
    recipe.write_text(yaml.safe_dump(tiny.content({"name": "vae"}, steps=2)))
    return [str(recipe), *options]


def launched(launcher: list[str], words: list[str], logs: Path) -> str:
    """What a training prints that a launcher starts as docs/clusters.md says."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    program, *options = [port if word == "PORT" else word for word in launcher]
    program = str(Path(sys.executable).parent / program)
    own = {
        "GLOO_SOCKET_IFNAME": socket.if_nameindex()[0][1],  # loopback
        "OMP_NUM_THREADS": "1",
        "TMPDIR": str(logs),  # torchrun leaves a folder of logs
    }
    done = subprocess.run(
        [program, *options, "tools/train_tokenizer.py", *words],
        env=os.environ | own,
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=180,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def summary_of(run: Path) -> tuple[int, int]:
    """How many processes ended a run, and its steps."""
    summary = yaml.safe_load((run / "summary.json").read_text())
    return summary["num_processes"], summary["steps"]
