"""Image sources by kind."""

from collections.abc import Callable
from functools import cache

from semtok.data.images.folder import Folder, FolderConfig
from semtok.data.images.mds import Mds, MdsConfig
from semtok.data.images.parquet import Parquet, ParquetConfig
from semtok.data.images.shapes import Shapes, ShapesConfig
from semtok.data.images.tars import Tars, TarsConfig
from semtok.data.source import DataConfig, ImageSource
from semtok.errors import UserError, did_you_mean
from semtok.progress import announce

_KINDS: dict[str, tuple[type[DataConfig], Callable[..., tuple[ImageSource, ImageSource]]]] = {
    "shapes": (ShapesConfig, Shapes.open),
    "folder": (FolderConfig, Folder.open),
    "parquet": (ParquetConfig, Parquet.open),
    "tars": (TarsConfig, Tars.open),
    "mds": (MdsConfig, Mds.open),
}


def data_config_class(kind: object, *, place: str) -> type[DataConfig]:
    """The settings of a kind of source.

    Raises:
        UserError: there is no such kind.
    """
    if kind not in _KINDS:
        hint = did_you_mean(str(kind), _KINDS, f"known: {', '.join(_KINDS)}")
        raise UserError(f"{place}: unknown kind '{kind}'; {hint}")
    return _KINDS[str(kind)][0]


def open_sources(config: DataConfig) -> tuple[ImageSource, ImageSource]:
    """The training and the held-out images; what lies beside them and is not used is told of, once.

    Raises:
        UserError: images are missing, or none of them is readable.
    """
    sources = _KINDS[config.kind][1](config)
    for source in sources:
        source.num_workers = config.num_workers
    left_out = sources[0].left_out
    if left_out:
        _tell(f"left out of {sources[0].name}: {left_out.line()}")
    return sources


@cache
def _tell(line: str) -> None:
    announce(line)  # commands open one set several times
