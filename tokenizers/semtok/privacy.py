"""What of a run's settings is fit to be shown: exports are published, and hold nothing of one machine or person."""

import re
from typing import Any

_LEFT_OUT = "…"
_URL = re.compile(
    r"(?P<scheme>[\w.+-]+)://(?P<host>[^/?#]*)(?P<path>[^?#]*)(?P<query>.*)", re.DOTALL
)
_ABSOLUTE = re.compile(r"[/~\\]|[A-Za-z]:[\\/]")
_HOST = re.compile(r"[\w.,{}\-]*(:\d+)?")
_LOCAL_SCHEMES = ("file", "local")


def fit_to_show(value: Any) -> Any:
    """Settings without places of this machine and without secrets of URLs; anything else is as it was.

    Of an absolute path the last part stays, ``…/images``; a URL loses credentials, query and fragment, and ends with
    ``…`` then. What was left out once stays as it is.

    Args:
        value: as JSON has it; lists and mappings are gone through, keys are not.
    """
    if isinstance(value, dict):
        return {key: fit_to_show(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [fit_to_show(inner) for inner in value]
    if isinstance(value, str):  # "::" chains fsspec's places, ``simplecache::https://…``
        return "::".join(_shown(place) for place in value.split("::"))
    return value


def first_left_out(value: Any) -> str | None:
    """The first of some settings of which ``fit_to_show`` has left something out, or None."""
    if isinstance(value, dict | list | tuple):
        inner = value.values() if isinstance(value, dict) else value
        return next((found for found in map(first_left_out, inner) if found is not None), None)
    if not isinstance(value, str):
        return None
    places = value.split("::")
    is_cut = any(
        p.startswith(f"{_LEFT_OUT}/") or "://" in p and p.endswith(_LEFT_OUT) for p in places
    )
    return value if is_cut else None


def _shown(place: str) -> str:
    url = _URL.fullmatch(place)
    if url is None and "://" in place:  # a command, or a sentence
        return _LEFT_OUT + "/"
    if url is None or url["scheme"] in _LOCAL_SCHEMES:
        path = place if url is None else "/" + url["path"]
        last = re.split(r"[/\\]", path.rstrip("/\\"))[-1]
        return f"{_LEFT_OUT}/{last}" if _ABSOLUTE.match(path) else place
    host, path = url["host"].rpartition("@")[2], url["path"]
    # A password may hold what ends a host.
    is_odd = not _HOST.fullmatch(host) or (":" in host and "@" in path + url["query"])
    if is_odd:
        host, path = _LEFT_OUT, f"/{path.rpartition('/')[2]}"
    is_whole = host == url["host"] and not url["query"]
    return f"{url['scheme']}://{host}{path}" + ("" if is_whole else _LEFT_OUT)
