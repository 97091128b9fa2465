"""Files behind a server, read by a process and by its loader processes at a time, and what reading leaves behind."""

import json

import pytest
import safetensors.torch
import torch

import stored
from file_server import file_server
from processes import succeed
from semtok.data.caches.shards import shard_checksum

pytest.importorskip("webdataset")
pyarrow = pytest.importorskip("pyarrow")
parquet = pytest.importorskip("pyarrow.parquet")

NUM = 8
READ = """
import atexit, gc, multiprocessing, os, sys, threading, time
from torch.utils.data import DataLoader, Dataset
import stored
from semtok.data.caches.remote_shards import RemoteShards
from semtok.data.images import parquet_stream
from semtok.data.images.parquet import Parquet, ParquetConfig
from semtok.data.images.tars import Tars, TarsConfig
from semtok.data.source import Key

NUM = 8
keys = [Key(i) for i in range(NUM)]

class Sources(Dataset):
    def __init__(self, address):
        place = {"validation": f"{address}/v", "size": 8}
        tars = TarsConfig(path=f"{address}/s.tar", **place | {"validation": f"{address}/v.tar"})
        rows = place | {"validation": f"{address}/v.parquet", "streaming": True}
        self.tars = Tars.open(tars)[0]
        self.parquet = Parquet.open(ParquetConfig(path=f"{address}/s.parquet", **rows))[0]
        self.shards = RemoteShards(f"{address}/shards", "test", kept=2)

    def __len__(self):
        return NUM

    def __getitem__(self, i):
        if i < 2:
            gc.collect()  # as happens sooner or later
        numbers = [stored.numbers(s.load([i]).images)[0] for s in (self.tars, self.parquet)]
        return [*numbers, int(self.shards.rows([Key(i)])["x"][0])]

def read(sources, method, num_workers):
    context = multiprocessing.get_context(method)
    loader = DataLoader(sources, num_workers=num_workers, multiprocessing_context=context, timeout=300)
    return [[int(number) for number in row] for row in loader]

def open_things():
    return len(os.listdir("/proc/self/fd")), threading.active_count()
"""
ALL = (
    READ
    + """
def beside():
    while going:
        done.append([sources.tars.load([i]).labels for i in range(0, NUM, 5)])
        sources.shards.rows(keys[::7])
        time.sleep(0.05)

def check():
    assert [sources[i] for i in range(NUM)] == expected

if __name__ == "__main__":
    parquet_stream.BLOCK_BYTES = 0
    expected = [[i] * 3 for i in range(NUM)]

    # Reading again opens nothing more.
    counts = []
    for _ in range(3):
        sources = Sources(sys.argv[1])
        check()
        counts.append(open_things())
    assert counts[1:] == counts[:1] * 2 and counts[0][1] <= 3, counts

    # What a forked process collects, and what it closes at its end, is its own.
    for _ in range(2):
        child = os.fork()
        if child == 0:
            gc.collect()
            check()
            atexit._run_exitfuncs()
            os._exit(0)
        assert os.waitpid(child, 0)[1] == 0
        check()

    # Loader processes read while their parent does.
    going, done = True, []
    thread = threading.Thread(target=beside)
    thread.start()
    for method, num_workers in (("fork", 2), ("spawn", 1)):  # which takes seconds for each
        assert read(sources, method, num_workers) == expected, method
        check()
    going = False
    thread.join(60)
    assert not thread.is_alive() and done
"""
)


@pytest.fixture
def server(tmp_path, monkeypatch):
    """A set of numbered images as tar and Parquet files, and their numbers as shards."""
    monkeypatch.setenv("SEMTOK_CACHE", str(tmp_path / "cache"))
    folder = tmp_path / "served"
    (folder / "shards").mkdir(parents=True)
    for name, numbers in (("s", range(NUM)), ("v", range(500, 502))):
        stored.write_tar(folder / f"{name}.tar", [(f"{n:04}.png", stored.png(n)) for n in numbers])
        table = pyarrow.table({"image": [stored.png(n) for n in numbers]})
        parquet.write_table(table, folder / f"{name}.parquet", row_group_size=1)
    entries = []
    for number in range(NUM // 4):
        file = folder / "shards" / f"shard-{number:06}.safetensors"
        own = torch.arange(4 * number, 4 * number + 4)
        safetensors.torch.save_file({"x": own[:, None].clone(), "labels": own}, file)
        about = {"file": file.name, "bytes": file.stat().st_size}
        entries.append(about | {"checksum": shard_checksum(file)})
    index = {"format_version": 1, "about": {}, "num_images": NUM, "shard_size": 4, "skipped": {}}
    (folder / "shards" / "index.json").write_text(json.dumps(index | {"shards": entries}))
    files = {f"/{f.relative_to(folder)}": f.read_bytes() for f in folder.rglob("*") if f.is_file()}
    with file_server(files) as running:
        yield running


def test_processes_read_at_the_same_time_and_leave_nothing_open(server, tmp_path):
    """In a process of its own, as it forks."""
    script = tmp_path / "script.py"
    script.write_text(ALL)
    succeed([str(script), server.address], tmp_path / "logs", num=1, seconds=200)
