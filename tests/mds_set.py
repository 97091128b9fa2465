"""Sets in the MDS format, put together from its description and not by the library's writer."""

import hashlib
import json
import struct
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import stored

SIZES = {"int": 8, "uint8": 1, "int64": 8, "float32": 4}


def sample(columns: Mapping[str, str], values: Mapping[str, bytes]) -> bytes:
    """One sample; columns and their encodings, sorted by name."""
    variable = [len(values[name]) for name, encoding in columns.items() if encoding not in SIZES]
    return struct.pack(f"<{len(variable)}I", *variable) + b"".join(values[name] for name in columns)


def write_shards(
    folder: Path,
    columns: Mapping[str, str],
    rows: Sequence[Mapping[str, bytes]],
    *,
    per_shard: int = 4,
    hashes: Sequence[str] = ("sha1",),
) -> dict[str, Any]:
    """Writes shards and their index, which it returns.

    Args:
        columns: encoding by name.
        rows: the encoded cells of each sample.
    """
    folder.mkdir(parents=True, exist_ok=True)
    columns = dict(sorted(columns.items()))
    about = {
        "version": 2,
        "format": "mds",
        "compression": None,
        "hashes": list(hashes),
        "size_limit": None,
        "column_names": list(columns),
        "column_encodings": list(columns.values()),
        "column_sizes": [SIZES.get(encoding) for encoding in columns.values()],
    }
    config, shards = json.dumps(about, sort_keys=True).encode(), []
    for first in range(0, len(rows), per_shard):
        samples = [sample(columns, row) for row in rows[first : first + per_shard]]
        bounds = [4 * (len(samples) + 2) + len(config)]
        for each in samples:
            bounds.append(bounds[-1] + len(each))
        content = struct.pack(f"<{len(bounds) + 1}I", len(samples), *bounds) + config
        content += b"".join(samples)
        name = f"shard.{len(shards):05}.mds"
        (folder / name).write_bytes(content)
        raw = {
            "basename": name,
            "bytes": len(content),
            "hashes": {
                algorithm: hashlib.new(algorithm, content).hexdigest() for algorithm in hashes
            },
        }
        shards.append({"samples": len(samples), "raw_data": raw, "zip_data": None} | about)
    index = {"version": 2, "shards": shards}
    (folder / "index.json").write_text(json.dumps(index))
    return index


def write_numbers(folder: Path, numbers: Sequence[int], **settings: Any) -> dict[str, Any]:
    """Numbered images of three classes, 0 to 2."""
    rows = [{"image": stored.png(n), "label": struct.pack("<q", n % 3)} for n in numbers]
    return write_shards(folder, {"image": "png", "label": "int"}, rows, **settings)


def served(folder: Path) -> dict[str, bytes]:
    """The files of a folder, by their path in a URL."""
    inside = (file for file in folder.rglob("*") if file.is_file())
    return {f"/{file.relative_to(folder)}": file.read_bytes() for file in inside}
