"""What the processes of one run agree on: running statistics, sums of metrics, unreadable images, when to stop."""

import json
from typing import Any

import pytest

from processes import Ranks, launch


@pytest.fixture(scope="module")
def seen(tmp_path_factory: pytest.TempPathFactory, ranks: Ranks) -> list[dict[str, Any]]:
    """What each of two processes saw."""
    folder = tmp_path_factory.mktemp("two")
    ranks.run("agreement_process:see", str(folder))
    return [json.loads((folder / f"{rank}.json").read_text()) for rank in range(2)]


@pytest.mark.parametrize("network", ["compressor", "discriminator"])
def test_running_statistics_are_the_same_in_every_process(network, seen):
    assert seen[0][network] == seen[1][network]


def test_every_process_goes_on_with_the_sums_of_all(seen):
    one, two = seen
    assert one["logged"] == two["logged"] == one["logged_after_resuming"]
    assert one["own_after_resuming"] == two["own_after_resuming"] == one["logged"]


def test_all_processes_stop_within_two_steps_of_a_signal_to_one(seen):
    assert seen[0]["stopped"] == seen[1]["stopped"]
    step, checkpoint = seen[0]["stopped"]
    assert 3 <= step <= 5 and checkpoint == f"step_{step:08d}"


def test_all_processes_stop_where_a_signal_reaches_one_that_draws_a_picture(seen):
    assert seen[0]["aside"] == seen[1]["aside"] == ["SIGUSR1", "step_00000003"]


def test_all_processes_are_told_that_another_run_is_in_the_folder(seen):
    assert "in_use: a run is at work there (process " in seen[0]["in_use"]
    assert seen[1]["in_use"].startswith("process 0: ") and "in_use" in seen[1]["in_use"]


def test_a_checkpoint_names_the_unreadable_images_of_every_process(seen):
    assert seen[0]["skipped"] == seen[1]["skipped"] == ["image 0", "image 1"]


def test_all_processes_end_where_one_can_not_write_a_checkpoint(seen):
    """Else the others would wait for it for hours."""
    assert "No space left on device" in seen[0]["full"]
    assert seen[1]["full"].startswith("process 0: ") and "No space left" in seen[1]["full"]


def test_where_one_process_is_killed_the_others_end_with_its_name(tmp_path):
    """That which waits where no transport tells of the dead, as over NCCL, too. And none is aborted as it ends: what
    would do so here is such a thread of a library as lives when the interpreter is taken apart."""
    script = """
import os, signal, sys, time
from types import SimpleNamespace
import torch.distributed as dist
from semtok import heartbeat
from semtok_cli import end_process, launched
from semtok.processes import gather, watching

heartbeat.INTERVAL, heartbeat.SUSPECTED_AFTER, heartbeat.GRACE = 0.2, 3.0, 0.5

def main(_):
    dist.init_process_group("gloo")
    with watching():
        gather(None)
        if dist.get_rank() == 1:
            os.kill(os.getpid(), signal.SIGKILL)
        if dist.get_rank() == 2:
            time.sleep(100)
        while True:
            gather(None)

class Library:
    def __del__(self):
        os.abort()

library = Library()
sys.modules["semtok.commands.made_up"] = SimpleNamespace(main=main)
end_process(launched("made_up"))
"""
    ranks = launch(["-c", script], tmp_path / "logs", num=3)
    assert [rank.code for rank in ranks] == [2, -9, 2], ranks
    for survivor in (ranks[0], ranks[2]):
        assert survivor.output.startswith("error: process 1 of 3 has ended; "), ranks
        assert survivor.output.count("\n") == 1, ranks
