"""Recipes, tensors, pickles, images and archives as strangers might make them, from small valid ones."""

import contextlib
import io
import json
import os
import pickle
import struct
import tarfile
import zipfile
import zlib
from collections.abc import Callable
from typing import Any

import numpy as np
import safetensors.torch
import torch
import yaml
from hypothesis import strategies as st
from PIL import Image

import stored
import tiny
from hostile import changed, damaged, values

# Recipes ------------------------------------------------------------------------------------------


def recipe_contents() -> list[dict[str, Any]]:
    tokenizers = [tiny.content(), tiny.content({"name": "vae"}), tiny.content({"name": "rae"})]
    generator = tiny.content()
    del generator["method"]
    generator |= {"tokenizer": "demo", "diffusion": {"network": "SiT-S/2"}, "sampler": {"steps": 2}}
    folder = tiny.content({"name": "vae"})
    folder["data"] = {"kind": "folder", "path": "images", "size": 16}
    return [*tokenizers, generator, folder]


ODD_YAML = (
    "&a [*a]",
    "{<<: {steps: 2}}",
    "&x {y: *x}",
    "[" * 2000,
    "2020-13-45",
    "0b",
    "0x",
    "9" * 5000,
    "1:99:99",
    "!!python/object/apply:os.system ['touch hit']",
    "!!binary x",
    "!!set {a, b}",
    "!!timestamp x",
    "!!int x",
    "!!float ''",
    "? [a]\n: b",
    "{a: &b [1, 2], c: *b}",
    '"\\ud800"',
    "{[1]: 2}",
    "=",
    "~",
    ".inf",
    "-.nan",
    "%YAML 9.9\n---\n",
    "--- 1\n--- 2",
    "\t",
    "&a0 [x, x]\n" + "".join(f"b{i}: &a{i + 1} [{', '.join([f'*a{i}'] * 9)}]\n" for i in range(12)),
    "{"
    + ", ".join(f"b{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9 if i else ['x'])}]" for i in range(12))
    + "}",
)


@st.composite
def yaml_texts(draw: st.DrawFn) -> bytes:
    content = draw(st.sampled_from(recipe_contents()))
    how = draw(st.sampled_from(["values", "values", "values", "text", "bytes"]))
    if how == "values":
        content = draw(changed(content))
    text = yaml.safe_dump(content, allow_unicode=draw(st.booleans()))
    if how == "text":
        lines = text.splitlines()
        at = draw(st.integers(0, len(lines) - 1))
        key = lines[at].partition(":")[0]
        odd = draw(st.sampled_from(ODD_YAML))
        lines[at] = draw(st.sampled_from([f"{key}: {odd}", odd, f"odd: {odd}\n{lines[at]}"]))
        text = "\n".join(lines)
    encoded = text.encode("utf-8", "surrogatepass")
    return draw(damaged(encoded)) if how == "bytes" else encoded


# Tensors ------------------------------------------------------------------------------------------


@st.composite
def tensor_files(draw: st.DrawFn, content: bytes) -> bytes:
    """A safetensors file with another header, other bytes, or other tensors."""
    how = draw(st.sampled_from(["bytes", "header", "tensors"]))
    if how == "bytes":
        return draw(damaged(content))
    if how == "header":
        length = int.from_bytes(content[:8], "little")
        header = draw(changed(json.loads(content[8 : 8 + length])))
        text = json.dumps(header).encode()
        return struct.pack("<Q", len(text)) + text + content[8 + length :]
    return safetensors.torch.save(draw(states(safetensors.torch.load(content))), {"format": "pt"})


ODD_DTYPES = (torch.float64, torch.float16, torch.int8, torch.bool, torch.complex64, torch.int64)


@st.composite
def states(draw: st.DrawFn, state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Tensors of other types, sizes and names than they had."""
    state = dict(state)
    for _ in range(draw(st.integers(1, 3))):
        name = draw(st.sampled_from(sorted(state)))
        value = state[name]
        how = draw(
            st.sampled_from(
                ["dtype", "flat", "empty", "scalar", "nan", "rename", "remove", "twice"]
            )
        )
        if how == "rename":
            odd = draw(
                st.sampled_from(["../x", "/x", "", "a.b", f"module.{name}", f"{name}.weight"])
            )
            state[odd] = state.pop(name)
        elif how == "remove":
            del state[name]
        else:
            made = {
                "dtype": lambda value=value: value.to(draw(st.sampled_from(ODD_DTYPES))),
                "flat": lambda value=value: value.reshape(-1).clone(),
                "empty": lambda value=value: value[..., :0].clone() if value.ndim else value,
                "scalar": lambda: torch.tensor(3.0),
                "nan": lambda value=value: torch.full_like(value.float(), torch.nan),
                "twice": lambda value=value: torch.cat([value, value]) if value.ndim else value,
            }
            state[name] = made[how]().contiguous()
    return state


# Pickles ------------------------------------------------------------------------------------------


class Evil:
    """In a pickle, a call."""

    def __init__(self, function: Callable[..., object], *arguments: object) -> None:
        self.call = function, arguments

    def __reduce__(self) -> tuple[Callable[..., object], tuple[object, ...]]:
        return self.call


EVIL = (
    Evil(open, "../hit", "w"),
    Evil(os.system, "touch ../hit"),
    Evil(eval, "__import__('os').mkdir('../hit')"),
    Evil(exec, "import os; os.mkdir('../hit')"),
    Evil(os.mkdir, "../hit"),
    Evil(getattr, b"", "hex"),
    Evil(np.fromfile, "/etc/passwd"),
)
GLOBALS = (
    *("argparse Namespace", "collections defaultdict", "collections OrderedDict", "typing Any"),
    *("omegaconf.dictconfig DictConfig", "omegaconf.nodes AnyNode", "numpy dtype", "numpy ndarray"),
    *("sklearn.decomposition._pca PCA", "numpy.core.multiarray scalar", "_codecs encode"),
    *("numpy._core.multiarray _reconstruct", "numpy._core.numeric _frombuffer", "os system"),
    *("builtins eval", "builtins getattr", "torch._utils _rebuild_tensor_v2", "torch FloatStorage"),
    *("torch._utils _rebuild_parameter", "torch Size", "builtins bytearray", "no_such x"),
)


@st.composite
def op_codes(draw: st.DrawFn) -> bytes:
    """A pickle that calls something with anything, and gives the result a state."""

    def plain(value: Any) -> bytes:
        return pickle.dumps(value, protocol=2)[2:-1]

    odd = values() | st.sampled_from(
        ["float32", "O", "f4", "V8", "latin1", b"", b"\0" * 16, (2, 3), (-1,), (2**40,)]
    )
    made = b"}" + plain("a") if draw(st.booleans()) else b""
    module, name = draw(st.sampled_from(GLOBALS)).split()
    body = f"c{module}\n{name}\n".encode()
    arguments = b"(" + b"".join(plain(draw(odd)) for _ in range(draw(st.integers(0, 4)))) + b"t"
    if draw(st.booleans()):
        inner = draw(st.sampled_from(GLOBALS)).split()
        arguments = f"(c{inner[0]}\n{inner[1]}\n".encode() + arguments[1:]
    body += arguments + draw(st.sampled_from([b"R", b"\x81", b"Q", b"1"]))
    if draw(st.booleans()):
        body += plain(draw(odd | st.tuples(odd, odd, odd, odd, odd))) + b"b"
    return b"\x80\x02" + made + body + (b"s" if made else b"") + b"."


def in_zip(pickled: bytes, name: str = "archive/data.pkl") -> bytes:
    """As torch writes it."""
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr(name, pickled)
        archive.writestr("archive/byteorder", "little")
        archive.writestr("archive/version", "3\n")
        archive.writestr("archive/data/0", b"\0" * 16)
    return file.getvalue()


def saved(content: Any, form: str) -> bytes:
    """As torch writes it today, as it did before 1.6, or without torch."""
    file = io.BytesIO()
    if form == "plain":
        return pickle.dumps(content)
    torch.save(content, file, _use_new_zipfile_serialization=form == "zip")
    return file.getvalue()


# Images -------------------------------------------------------------------------------------------


FORMATS = (
    "PNG",
    "JPEG",
    "WEBP",
    "GIF",
    "TIFF",
    "BMP",
    "ICO",
    "TGA",
    "PPM",
    "PCX",
    "SGI",
    "DDS",
    "QOI",
)
FORMATS += ("JPEG2000", "AVIF", "ICNS")


def pictures() -> dict[str, bytes]:
    pixels = np.random.default_rng(0).integers(0, 256, (20, 24, 3), dtype=np.uint8)
    image = Image.fromarray(pixels)
    made = {}
    for form in FORMATS:
        file = io.BytesIO()
        with contextlib.suppress(KeyError, OSError):  # this Pillow does not write it
            image.save(file, form)
            made[form] = file.getvalue()
    return made


def png_of_size(width: int, height: int) -> bytes:
    """A PNG that says so, and holds a few rows."""

    def chunk(name: bytes, content: bytes) -> bytes:
        checksum = struct.pack(">I", zlib.crc32(name + content))
        return struct.pack(">I", len(content)) + name + content + checksum

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    body = chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(bytes(4000))) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + body


# Archives -----------------------------------------------------------------------------------------


MEMBER_NAMES = (
    "../x.png",
    "/x.png",
    "a/../../x.png",
    "x",
    ".png",
    "x.",
    "\n.png",
    "a" * 300 + ".png",
    "\udcff.png",
)
MEMBER_NAMES += (
    "0.png",
    "0.cls",
    "0.json",
    "1.jpg",
    "__key__.png",
    "a//b.png",
    "./0.png",
    "x\u202e.png",
)


@st.composite
def tar_files(draw: st.DrawFn) -> bytes:
    file = io.BytesIO()
    format = draw(st.sampled_from([tarfile.PAX_FORMAT, tarfile.GNU_FORMAT]))
    with tarfile.open(fileobj=file, mode="w", format=format) as archive:
        for number in range(4):
            for name, content in (
                (f"{number}.png", stored.png(number)),
                (f"{number}.cls", b"%d" % (number % 2)),
            ):
                about = tarfile.TarInfo(f"s{name}")
                about.size = len(content)
                archive.addfile(about, io.BytesIO(content))
        for _ in range(draw(st.integers(0, 3))):
            about = tarfile.TarInfo(draw(st.sampled_from(MEMBER_NAMES)))
            about.type = draw(
                st.sampled_from(
                    [tarfile.REGTYPE] * 4 + [tarfile.SYMTYPE, tarfile.LNKTYPE, b"3", b"5"]
                )
            )
            about.linkname = draw(
                st.sampled_from(["/etc/passwd", "../x", about.name, "s0.png", ""])
            )
            content = draw(
                st.sampled_from(
                    [b"", b"7", b'{"label": [1]}', b'{"label": "\\ud800"}', b"[" * 3000]
                )
            )
            content = draw(st.sampled_from([content, stored.png(9), b"9" * 5000, b"\xff\xfe"]))
            about.size = len(content) if about.type == tarfile.REGTYPE else 0
            archive.addfile(about, io.BytesIO(content))
    content = file.getvalue()
    return draw(damaged(content, head=2000)) if draw(st.booleans()) else content
