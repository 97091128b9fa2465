"""The launchers of docs/clusters.md start two processes, which train one run together."""

import os
import socket
import subprocess
import sys
from pathlib import Path

import yaml

import tiny

ROOT = Path(__file__).parents[1]


def test_two_processes_of_one_launcher_train_and_those_of_another_go_on(tmp_path):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(yaml.safe_dump(tiny.content({"name": "vae"}, steps=2)))
    run = tmp_path / "run"
    begun = launched(
        ["torchrun", "--nproc-per-node", "2", "--master-port", "PORT", "--"],
        [str(recipe), "--output", str(run), "--resume", "auto"],
        tmp_path,
    )
    assert begun.count("training vae on") == 1
    assert summary_of(run) == (2, 2)
    gone_on = launched(
        ["accelerate", "launch", "--multi_gpu", "--num_processes", "2"]
        + ["--main_process_port", "PORT"],
        [str(recipe), "--output", str(run), "--resume", "auto", "train.steps=4"],
        tmp_path,
    )
    assert gone_on.count("training vae on") == 1
    assert summary_of(run) == (2, 4)


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
