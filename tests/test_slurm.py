"""The batch script of docs/clusters.md, as SLURM runs it: several processes, a time limit, and again."""

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

import tiny

ROOT = Path(__file__).parents[1]
SCRIPT = ROOT / "tools" / "slurm" / "train.sbatch"
TASKS = 2
# Starts the processes of a step, and ends with the highest of their codes, as SLURM's does.
SRUN = f"""#!/bin/bash
[[ $1 == --kill-on-bad-exit=0 ]] || exit 64
shift
for task in $(seq 0 {TASKS - 1}); do
    SLURM_PROCID=$task SLURM_LOCALID=$task "$@" & running="$running $!"
done
highest=0
for process in $running; do
    wait "$process"; code=$?
    (( code > highest )) && highest=$code
done
exit $highest
"""
SCONTROL = """#!/bin/bash
case $1 in
show) echo 127.0.0.1; echo second.node;;
requeue) echo "$2" >> "$REQUEUED";;
esac
"""


def submit(folder: Path, semtok: str, *words: str) -> subprocess.CompletedProcess[str]:
    """Runs the script beside a stand-in of the cluster.

    Args:
        semtok: what the command is, a script.
    """
    for name, text in (("srun", SRUN), ("scontrol", SCONTROL), ("semtok", semtok)):
        (folder / name).write_text(text)
        (folder / name).chmod(0o755)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        job = free.getsockname()[1] - 20000  # of which the script makes the port
    environment = {
        "PATH": f"{folder}{os.pathsep}{os.environ['PATH']}",
        "SLURM_JOB_ID": str(job % 20000 if job >= 0 else job),
        "SLURM_JOB_NODELIST": "node[1-2]",
        "SLURM_NTASKS": str(TASKS),
        "REQUEUED": str(folder / "requeued"),
        "GLOO_SOCKET_IFNAME": socket.if_nameindex()[0][1],  # loopback
        "OMP_NUM_THREADS": "1",
    }
    return subprocess.run(
        ["bash", str(SCRIPT), *words],
        env=os.environ | environment,
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
        timeout=180,
    )


@pytest.mark.parametrize("code", [0, 2, 138])
def test_a_job_is_requeued_after_its_signal_alone(code, tmp_path):
    told = (
        '#!/bin/bash\necho "$RANK $LOCAL_RANK $WORLD_SIZE $MASTER_ADDR $*"\nexit $((RANK * CODE))'
    )
    done = submit(tmp_path, told.replace("CODE", str(code)), "train_tokenizer", "vae", "a=b c")
    assert done.returncode == code, done.stderr
    assert sorted(done.stdout.splitlines()) == [
        f"{rank} {rank} 2 127.0.0.1 train_tokenizer vae a=b c --resume auto" for rank in (0, 1)
    ]
    assert (tmp_path / "requeued").exists() == (code == 138)


@pytest.mark.long
def test_its_processes_train_together(tmp_path):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(yaml.safe_dump(tiny.content({"name": "vae"}, steps=2)))
    semtok = f'#!/bin/bash\nexec {sys.executable} -m semtok_cli "$@"\n'
    words = ["train_tokenizer", str(recipe), "--output", str(tmp_path / "run")]
    done = submit(tmp_path, semtok, *words)
    assert done.returncode == 0, done.stdout + done.stderr
    summary = yaml.safe_load((tmp_path / "run" / "summary.json").read_text())
    assert summary["num_processes"] == TASKS and summary["steps"] == 2
    assert done.stdout.count("training vae on") == 1
