"""Files behind a server, read by a process and by its loader processes at a time, and what reading leaves behind."""

import json
from pathlib import Path

import pytest
import safetensors.torch
import torch

import stored
from file_server import FileServer, file_server
from processes import succeed
from semtok.data.caches.shards import shard_checksum

pytest.importorskip("webdataset")
pyarrow = pytest.importorskip("pyarrow")
parquet = pytest.importorskip("pyarrow.parquet")

NUM = 24
READ = """
import multiprocessing, os, sys, threading
from pathlib import Path
from torch.utils.data import DataLoader, Dataset
import stored
from semtok.data.caches.remote_shards import RemoteShards
from semtok.data.images import parquet_stream
from semtok.data.images.parquet import Parquet, ParquetConfig
from semtok.data.images.tars import Tars, TarsConfig

NUM = 24
keys = [(i, False) for i in range(NUM)]

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
        numbers = [stored.numbers(s.load([i]).images)[0] for s in (self.tars, self.parquet)]
        return [*numbers, int(self.shards.rows([(i, False)])["x"][0])]

def read(sources, method, num_workers=2):
    context = multiprocessing.get_context(method)
    loader = DataLoader(sources, num_workers=num_workers, multiprocessing_context=context, timeout=60)
    return [[int(number) for number in row] for row in loader]

def open_things():
    return len(os.listdir("/proc/self/fd")), threading.active_count()
"""
BESIDE = (
    READ
    + """
if __name__ == "__main__":
    parquet_stream.BLOCK_BYTES = 0
    sources = Sources(sys.argv[1])
    expected = [[i] * 3 for i in range(NUM)]
    assert [sources[i] for i in range(NUM)] == expected  # connections are open now
    going, mine = True, []
    def beside():
        while going:
            mine.append([sources.tars.load([i]).labels for i in range(0, NUM, 5)])
            sources.shards.rows(keys[::7])
    thread = threading.Thread(target=beside)
    thread.start()
    for method in sys.argv[2:]:
        assert read(sources, method) == expected, method
        assert [sources[i] for i in range(NUM)] == expected
    going = False
    thread.join(60)
    assert not thread.is_alive() and mine
"""
)
CHILD = (
    READ
    + """
if __name__ == "__main__":
    sources = Sources(sys.argv[1])
    before = [sources[i] for i in range(NUM)]
    children = []
    for _ in range(3):
        child = os.fork()
        if child == 0:
            assert [sources[i] for i in range(NUM)] == before
            sys.exit(0)  # with all that a process does at its end
        assert [sources[i] for i in range(NUM)] == before
        assert os.waitpid(child, 0)[1] == 0
    assert [sources[i] for i in range(NUM)] == before
"""
)
AGAIN = (
    READ
    + """
if __name__ == "__main__":
    counts = []
    for _ in range(4):
        sources = Sources(sys.argv[1])
        assert [sources[i][0] for i in range(NUM)] == list(range(NUM))
        del sources
        counts.append(open_things())
    print("COUNTS", counts)
    assert counts[1:] == counts[:1] * 3, counts
    assert counts[0][1] <= 3, "fsspec's thread, and one in which it looks up names"
    assert not [name for name in os.listdir(os.environ["TMPDIR"])]
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


def run(script: str, server: FileServer, folder: Path, *words: str) -> None:
    (folder / "script.py").write_text(script)
    succeed(
        [str(folder / "script.py"), server.address, *words], folder / "logs", num=1, seconds=150
    )


@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_loader_processes_read_while_their_parent_does(server, tmp_path, method):
    run(BESIDE, server, tmp_path, method)


def test_a_forked_process_that_ends_leaves_its_parents_connections_alone(server, tmp_path):
    run(CHILD, server, tmp_path)


def test_what_reading_opens_is_used_again(server, tmp_path, monkeypatch):
    (tmp_path / "temporary").mkdir()
    monkeypatch.setenv("TMPDIR", str(tmp_path / "temporary"))
    run(AGAIN, server, tmp_path)
