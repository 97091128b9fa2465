"""Image sources by kind."""

import difflib

from semtok.data.images.folder import Folder, FolderConfig
from semtok.data.images.parquet import Parquet, ParquetConfig
from semtok.data.images.shapes import Shapes, ShapesConfig
from semtok.data.images.tars import Tars, TarsConfig
from semtok.data.source import DataConfig, ImageSource
from semtok.errors import UserError

_CONFIGS: dict[str, type[DataConfig]] = {
    "shapes": ShapesConfig,
    "folder": FolderConfig,
    "parquet": ParquetConfig,
    "tars": TarsConfig,
}


def data_config_class(kind: object, *, place: str) -> type[DataConfig]:
    """The settings of a kind of source.

    Raises:
        UserError: there is no such kind.
    """
    if kind not in _CONFIGS:
        near = difflib.get_close_matches(str(kind), _CONFIGS, n=1)
        raise UserError(
            f"{place}: unknown kind '{kind}'; "
            + (f"did you mean '{near[0]}'?" if near else f"known: {', '.join(_CONFIGS)}")
        )
    return _CONFIGS[str(kind)]


def open_sources(config: DataConfig) -> tuple[ImageSource, ImageSource]:
    """The training and the held-out images.

    Raises:
        UserError: images are missing, or none of them is readable.
    """
    sources: tuple[ImageSource, ImageSource]
    match config:
        case ShapesConfig():
            sources = Shapes(config, train=True), Shapes(config, train=False)
        case FolderConfig():
            sources = Folder.open(config)
        case ParquetConfig():
            sources = Parquet.open(config)
        case TarsConfig():
            sources = Tars.open(config)
        case _:
            raise AssertionError(f"no source for {type(config).__name__}")
    for source in sources:
        source.num_workers = config.num_workers
    return sources
