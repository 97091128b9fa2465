"""Tests in several processes end, and leave nothing behind."""

import os
import subprocess
import sys
import threading
import time
from pathlib import Path

import psutil
import pytest

from given_back import held, taken_since
from processes import launch, started


def say(text: str) -> None:
    print(text, os.environ["RANK"], os.environ.get("SAID"))


def fail_in(rank: int, seconds: float = 60) -> None:
    print("begun", flush=True)
    if int(os.environ["RANK"]) == rank:
        raise ValueError("no")
    time.sleep(seconds)


def test_processes_share_their_start_until_one_fails(ranks, monkeypatch):
    monkeypatch.setenv("SAID", "now")
    assert ranks.run("test_processes:say", "a") == ["a 0 now\n", "a 1 now\n"]
    first = [process.pid for process in ranks._running]
    assert ranks.run("test_processes:say", "b") == ["b 0 now\n", "b 1 now\n"]
    assert first == [process.pid for process in ranks._running]
    with pytest.raises(AssertionError) as raised:
        ranks.run("test_processes:fail_in", 1)
    assert "rank 0, exit code -9\nbegun" in str(raised.value)
    assert "rank 1, exit code 1\nbegun" in str(raised.value) and "ValueError: no" in str(
        raised.value
    )
    assert not any(map(psutil.pid_exists, first))
    assert ranks.run("test_processes:say", "c") == ["c 0 now\n", "c 1 now\n"]


def test_what_takes_too_long_is_ended_and_shown(ranks, tmp_path):
    with pytest.raises(AssertionError, match="fail_in did not end everywhere\n(.*\n)?begun"):
        ranks.run("test_processes:fail_in", 5, seconds=2)
    words = ["-c", "import time; print('begun', flush=True); time.sleep(60)"]
    assert [(rank.code, rank.output) for rank in launch(words, tmp_path, seconds=1)] == [
        (-9, "begun\n")
    ] * 2


@pytest.mark.parametrize("way", ["started", "forked"])
def test_processes_do_not_outlive_what_started_them(way, tmp_path):
    script = (
        "import sys, time, processes; from pathlib import Path\n"
        "processes._FORKS.set_forkserver_preload([])  # which takes seconds\n"
        "begin, words = getattr(processes, sys.argv[2]), ['-c', 'import time; time.sleep(60)']\n"
        "with begin(words, Path(sys.argv[1])) as process:\n"
        "    print(process.pid, flush=True); time.sleep(60)"
    )
    words = ["-c", script, str(tmp_path / "inner.log"), way]
    with started(words, tmp_path / "log") as process:
        while not (text := (tmp_path / "log").read_text()).endswith("\n"):
            time.sleep(0.02)
        process.kill()
    for _ in range(500):
        if not psutil.pid_exists(int(text)) or psutil.Process(int(text)).status() == "zombie":
            return
        time.sleep(0.02)
    pytest.fail("it still runs")


def test_it_is_seen_what_is_not_given_back(tmp_path, monkeypatch):
    monkeypatch.setattr("given_back._PATIENCE_SECONDS", 0)
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    before, end = held(), threading.Event()
    file = (tmp_path / "kept").open("w")
    thread = threading.Thread(target=end.wait, name="waits")
    thread.start()
    child = subprocess.Popen(["sleep", "60"])
    try:
        assert taken_since(before) == [
            f"1 x descriptor {tmp_path}/kept",
            "1 x file kept",
            "1 x process sleep 60",
            "1 x thread waits",
        ]
    finally:
        end.set()
        thread.join()
        child.kill()
        child.wait()
        file.close()
        (tmp_path / "kept").unlink()
    assert not taken_since(before)


def test_a_test_that_hangs_fails_with_where_it_hangs(tmp_path):
    (tmp_path / "test_it.py").write_text(
        "import threading\ndef test_it():\n    threading.Event().wait()\n"
    )
    settings = Path(__file__).parents[1] / "pyproject.toml"
    words = ["-c", str(settings), "--rootdir", str(tmp_path), "-n", "0", "-p", "no:cacheprovider"]
    words += ["-o", "faulthandler_timeout=1", str(tmp_path)]
    done = subprocess.run(
        [sys.executable, "-m", "pytest", *words], capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 1 and "Timeout" in done.stderr and "in test_it" in done.stderr


JOIN = """
import datetime, time
from semtok.training import process
process.PATIENCE_OF_JOINING = datetime.timedelta(seconds=SECONDS)
process.TOLD_AFTER = 0.5
"""


def test_a_process_whose_others_never_start_says_so_and_ends(tmp_path):
    source = JOIN.replace("SECONDS", "3") + (
        "import os; from semtok.commands.cli import run\n"
        "os.environ |= {'WORLD_SIZE': '2', 'RANK': '0', 'LOCAL_RANK': '0'}\n"
        "raise SystemExit(run(lambda words: process.join_processes() or 0, []))"
    )
    (rank,) = launch(["-c", source], tmp_path, num=1)
    assert rank.code == 2
    told = "process 0 of 2 (RANK, WORLD_SIZE): "
    assert f"{told}waiting for the others to start" in rank.output
    assert f"error: {told}the others did not start within 0.05 minutes" in rank.output


def test_after_the_processes_have_met_they_wait_longer_for_each_other(tmp_path):
    # They join when both have imported, which may take one of them longer.
    source = JOIN.replace("SECONDS", "3") + (
        "import os, pathlib, sys\n"
        "from semtok.processes import gather, process_index\n"
        "here = pathlib.Path(sys.argv[1]); (here / os.environ['RANK']).touch()\n"
        "while len(list(here.glob('[01]'))) < 2: time.sleep(0.01)\n"
        "process.join_processes()\n"
        "time.sleep(4 * process_index())\n"
        "print(gather(process_index()))"
    )
    met = tmp_path / "met"
    met.mkdir()
    assert [
        rank.output.splitlines()[-1] for rank in launch(["-c", source, str(met)], tmp_path)
    ] == ["[0, 1]"] * 2
