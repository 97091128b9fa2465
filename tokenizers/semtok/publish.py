"""Exports to the Hugging Face Hub: one commit of all files, or none."""

import tempfile
from pathlib import Path
from typing import Any

from huggingface_hub import CommitOperationAdd, HfApi
from huggingface_hub.errors import HfHubHTTPError, HFValidationError
from huggingface_hub.utils import validate_repo_id

from semtok.card import PLACEHOLDER, README
from semtok.errors import UserError
from semtok.storage import first_line, read_json

PIPELINE_FILE = "model_index.json"
"""Marks a folder that diffusers loads as a pipeline."""
_TRANSPORTS = ("httpx2", "httpx", "requests", "urllib3")
_REASONS = {
    401: "the token is missing or not valid; 'hf auth login', or set HF_TOKEN",
    403: "the token may not write there; use one with write access, or another name",
    404: "there is no such repository or branch, or the token may not see it",
    409: "there is a conflict with what is there, or with another commit at the same time",
}


def is_pipeline(folder: Path) -> bool:
    """Whether a folder is a diffusers pipeline that this library has exported."""
    if not (folder / PIPELINE_FILE).is_file():
        return False
    index = read_json(folder / PIPELINE_FILE)
    return isinstance(index, dict) and index.get("_library") == "semtok"


def export_files(folder: Path) -> list[tuple[str, int]]:
    """Relative path and size in bytes of every file that a push would upload.

    Raises:
        UserError: not an export of this library.
    """
    if not is_pipeline(folder):
        config = read_json(folder / "config.json")
        if not isinstance(config, dict) or config.get("library") != "semtok":
            raise UserError(
                f"{folder}: not an export of semtok; expected a run, its export/, or what 'hub export' writes"
            )
    inside = (p.relative_to(folder) for p in folder.rglob("*") if p.is_file())
    # Hidden files are somebody's own: settings, a checkout's .git.
    files = sorted(folder / p for p in inside if not any(part[0] == "." for part in p.parts))
    return [(p.relative_to(folder).as_posix(), p.stat().st_size) for p in files]


def push_export(
    folder: Path,
    repo_id: str,
    *,
    private: bool = True,
    message: str | None = None,
    branch: str | None = None,
    token: str | None = None,
) -> str:
    """Uploads an export as one commit and returns its address.

    A repository that is missing is created; one that is there keeps its visibility. The card gets the repository's
    name. The folder is only read, so a failed push leaves it as it was, and may be tried again.

    Args:
        repo_id: ``org/name`` or ``name``.
        private: of a new repository.
        message: of the commit.
        branch: None: the main one.
        token: None: from HF_TOKEN, or as 'hf auth login' has stored it.

    Raises:
        UserError: a name that the Hub does not take, no access, no connection.
    """
    files = export_files(folder)
    check_repo_id(repo_id)
    api = HfApi(token=token, library_name="semtok")
    operations = [
        CommitOperationAdd(path_in_repo=name, path_or_fileobj=_content(folder, name, repo_id))
        for name, _ in files
    ]
    way_on = f"{folder} is as it was, and the same command tries again"
    try:
        repository = api.create_repo(repo_id, private=private, exist_ok=True)
        commit = api.create_commit(
            repository.repo_id,
            operations,
            commit_message=message or "Upload by semtok",
            revision=branch,
        )
    except HfHubHTTPError as error:
        status = error.response.status_code if error.response is not None else None
        reason = _REASONS.get(status, f"the Hub answers {status}: {first_line(error)}")
        raise UserError(f"{repo_id}: {reason}; {way_on}") from None
    except Exception as error:
        # The Hub's client has changed its HTTP library more than once; their errors share no base.
        transport = type(error).__module__.split(".")[0] in _TRANSPORTS
        if not (transport or isinstance(error, OSError | RuntimeError)):
            raise
        raise UserError(
            f"{repo_id}: the connection failed ({first_line(error)}); {way_on}"
        ) from None
    return str(commit.repo_url)


class PushToHub:
    """Gives a model that has ``save_pretrained`` its ``push_to_hub``."""

    def push_to_hub(self, repo_id: str, **options: Any) -> str:
        """Uploads what ``save_pretrained`` writes, as one commit, and returns its address.

        Args:
            repo_id: ``org/name`` or ``name``.
            options: ``private``, ``message``, ``branch``, ``token``, as ``push_export`` takes them.

        Raises:
            UserError: a name that the Hub does not take, no access, no connection.
        """
        check_repo_id(repo_id)
        with tempfile.TemporaryDirectory() as folder:
            export = Path(folder) / "export"
            self.save_pretrained(export)  # type: ignore[attr-defined]
            return push_export(export, repo_id, **options)


def check_repo_id(repo_id: str) -> None:
    """Raises UserError where the Hub would not take the name."""
    try:
        validate_repo_id(repo_id)
    except HFValidationError as error:
        raise UserError(f"'{repo_id}' is no name on the Hub: {first_line(error)}") from None


def _content(folder: Path, name: str, repo_id: str) -> Path | bytes:
    if name != README:
        return folder / name
    return (folder / name).read_text(encoding="utf-8").replace(PLACEHOLDER, repo_id).encode()
