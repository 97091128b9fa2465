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


@pytest.mark.parametrize(
    "launcher",
    [
        ["torchrun", "--nproc-per-node", "2", "--master-port", "PORT", "--"],
        ["accelerate", "launch", "--multi_gpu", "--num_processes", "2"]
        + ["--main_process_port", "PORT"],
    ],
    ids=lambda words: words[0],
)
def test_a_launcher_trains_by_two_processes_and_goes_on(launcher, tmp_path):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(yaml.safe_dump(tiny.content({"name": "vae"}, steps=2)))
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    words = [port if word == "PORT" else word for word in launcher]
    words[0] = str(Path(sys.executable).parent / words[0])
    run = tmp_path / "run"
    command = [*words, "tools/train_tokenizer.py", str(recipe), "--output", str(run)]
    own = {
        "GLOO_SOCKET_IFNAME": socket.if_nameindex()[0][1],  # loopback
        "OMP_NUM_THREADS": "1",
        "TMPDIR": str(tmp_path),  # torchrun leaves a folder of logs
    }
    done = subprocess.run(
        [*command, "--resume", "auto"],
        env=os.environ | own,
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=180,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    summary = yaml.safe_load((run / "summary.json").read_text())
    assert summary["num_processes"] == 2 and summary["steps"] == 2
    assert done.stdout.count("training vae on") == 1
