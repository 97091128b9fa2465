"""What of a run's settings is fit to be shown: exports are published, and hold nothing of one machine or person."""

import re
from typing import Any

_LEFT_OUT = "…"
_URL = re.compile(
    r"(?P<scheme>[\w.+-]+)://(?P<host>[^/?#]*)(?P<path>[^?#]*)(?P<query>.*)", re.DOTALL
)
# A path from the root, of a home or a variable, on a drive, or behind a word and a colon: ``file:/x``, ``me@host:/x``.
_ABSOLUTE = re.compile(r"[/~\\$]|[^/\s]*:[\\/]|[^/\s]*@")
_QUERY = re.compile(r"\?[^?]*=.*", re.DOTALL)
_HOST = re.compile(r"[\w.,{}\-]*(:\d+)?")
_CUT = re.compile(r"(^|::|[{,])…/|/[^\s]*…($|::)")
_LOCAL_SCHEMES = ("file", "local")
_URLS_IN_TEXT = re.compile(r"""\b(?!file:|local:)[A-Za-z][\w+.-]*://[^\s'"]*[^\s'":;,.)]""")


def fit_to_show(value: Any) -> Any:
    """Settings without places of this machine and without secrets of URLs; anything else is as it was.

    Of an absolute path the last part stays, ``…/images``, also of each between braces; a URL loses credentials, query
    and fragment, and ends with ``…`` then. What was left out once stays as it is.

    Args:
        value: as JSON has it; lists and mappings are gone through.
    """
    if isinstance(value, dict):
        return {fit_to_show(key): fit_to_show(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [fit_to_show(inner) for inner in value]
    if isinstance(value, str):  # "::" chains fsspec's places, ``simplecache::https://…``
        return "::".join(map(_shown, value.split("::")))
    return value


def without_secrets(text: str) -> str:
    """A message whose URLs have lost credentials, queries and fragments, and end with ``…`` then."""
    return _URLS_IN_TEXT.sub(lambda found: fit_to_show(found[0]), text)


def first_left_out(value: Any) -> str | None:
    """The first of some settings of which ``fit_to_show`` has left something out, or None."""
    if isinstance(value, dict | list | tuple):
        inner = [*value, *value.values()] if isinstance(value, dict) else value
        return next((found for found in map(first_left_out, inner) if found is not None), None)
    is_cut = isinstance(value, str) and _CUT.search(value)
    return value if is_cut else None


def _shown(place: str) -> str:
    place = place.strip() if _ABSOLUTE.match(place.strip()) else place
    url = _URL.fullmatch(place)
    if url is None:
        return _shown_path(place)
    if url["scheme"] in _LOCAL_SCHEMES:
        return _without_folders("/" + url["path"])
    host, path = url["host"].rpartition("@")[2], url["path"]
    # A password may hold what ends a host.
    is_odd = not _HOST.fullmatch(host) or (":" in host and "@" in path + url["query"])
    if is_odd:
        host, path = _LEFT_OUT, f"/{path.rpartition('/')[2]}"
    is_whole = host == url["host"] and not url["query"]
    return f"{url['scheme']}://{host}{path}" + ("" if is_whole else _LEFT_OUT)


def _shown_path(place: str) -> str:
    if "{" in place and not _ABSOLUTE.match(place):  # braces begin it, or name several
        return "".join(p if p in "{}," else _shown(p) for p in re.split(r"([{},])", place) if p)
    if "://" in place:  # a command, or a sentence
        return _LEFT_OUT + "/"
    if _QUERY.search(place):
        return _shown(_QUERY.sub("", place)) + _LEFT_OUT
    return _without_folders(place)


def _without_folders(path: str) -> str:
    last = re.split(r"[/\\]", path.rstrip("/\\"))[-1]
    return f"{_LEFT_OUT}/{last}" if _ABSOLUTE.match(path) else path
