"""Image sources by kind."""

import difflib
from collections.abc import Callable

from semtok.data.images.folder import Folder, FolderConfig
from semtok.data.images.parquet import Parquet, ParquetConfig
from semtok.data.images.shapes import Shapes, ShapesConfig
from semtok.data.images.tars import Tars, TarsConfig
from semtok.data.source import DataConfig, ImageSource
from semtok.errors import UserError

_KINDS: dict[str, tuple[type[DataConfig], Callable[..., tuple[ImageSource, ImageSource]]]] = {
    "shapes": (ShapesConfig, Shapes.open),
    "folder": (FolderConfig, Folder.open),
    "parquet": (ParquetConfig, Parquet.open),
    "tars": (TarsConfig, Tars.open),
}


def data_config_class(kind: object, *, place: str) -> type[DataConfig]:
    """The settings of a kind of source.

    Raises:
        UserError: there is no such kind.
    """
    if kind not in _KINDS:
        near = difflib.get_close_matches(str(kind), _KINDS, n=1)
        raise UserError(
            f"{place}: unknown kind '{kind}'; "
            + (f"did you mean '{near[0]}'?" if near else f"known: {', '.join(_KINDS)}")
        )
    return _KINDS[str(kind)][0]


def open_sources(config: DataConfig) -> tuple[ImageSource, ImageSource]:
    """The training and the held-out images.

    Raises:
        UserError: images are missing, or none of them is readable.
    """
    sources = _KINDS[config.kind][1](config)
    for source in sources:
        source.num_workers = config.num_workers
    return sources
