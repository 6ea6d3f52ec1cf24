"""Push a promoted model to the hub in one commit: only what differs, and first in private.

An upload leaves nothing visible until the commit. After a failure the hub keeps the files that
arrived, so the next push continues there.
"""

from __future__ import annotations

import fnmatch
import hashlib
import re
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from cosmos_cli import console, files, paths
from cosmos_cli.download import hub
from cosmos_cli.download.assets import Asset, RemoteFile
from cosmos_cli.errors import UserError, asset_error, usage_error
from cosmos_cli.paths import Run

TOKENS = "https://huggingface.co/settings/tokens"
# The files that an earlier push may have left and this one does not write.
_OLD = (
    *(f"{name}*" for name in paths.MODEL_FORMATS.values()),
    paths.LORA_FILE, paths.COMFYUI_LORA_FILE, "samples/step_*",
)  # fmt: skip
# A repository with both was pushed by cosmos.
_MARKS = {paths.MANIFEST_FILE, "recipe.yaml"}


@dataclass(frozen=True)
class Item:
    """A file to push: its name in the repository, and its path or content."""

    name: str
    content: Path | bytes

    @property
    def size(self) -> int:
        """Bytes of the file."""
        if isinstance(self.content, bytes):
            return len(self.content)
        return files.size_of(self.content)

    def is_at(self, remote: RemoteFile | None) -> bool:
        """True if the hub has this file with the same content."""
        if remote is None:
            return False
        if isinstance(self.content, Path):
            return remote.is_at(self.content)
        git = b"blob %d\0" % len(self.content) if remote.is_git_hash else b""
        algorithm = "sha1" if remote.is_git_hash else "sha256"
        found = hashlib.new(algorithm, git + self.content, usedforsecurity=False)
        return found.hexdigest() == remote.digest


@dataclass(frozen=True)
class Remote:
    """A repository of the hub: its newest commit, visibility and files by name."""

    revision: str
    private: bool
    files: dict[str, RemoteFile]


@dataclass(frozen=True)
class Plan:
    """The files to upload, those that the hub has already, and the names to delete."""

    changed: list[Item]
    unchanged: list[Item]
    gone: list[str]

    @property
    def bytes(self) -> int:
        """Bytes to upload."""
        return sum(item.size for item in self.changed)

    def say(self, repo: str) -> None:
        """Print every file with its size and what happens to it."""
        rows = [(item, "upload") for item in self.changed]
        rows += [(item, "unchanged") for item in self.unchanged]
        for item, what in sorted(rows, key=lambda row: row[0].name):
            console.say(f"{what:9} {console.size(item.size):>9}  {item.name}")
        for name in self.gone:
            console.say(f"{'delete':9} {'':9}  {name}")
        console.say(f"{len(self.changed)} files, {console.size(self.bytes)}, to upload to {repo}")


def is_repository(name: str) -> bool:
    """True if the hub accepts a name as OWNER/NAME."""
    from huggingface_hub import errors
    from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]

    try:
        validate_repo_id(name)
    except errors.HFValidationError:
        return False
    return name.count("/") == 1


def look(repo: str) -> Remote | None:
    """Return a repository as it is on the hub, or None if there is none that the token may see.

    Raises:
        UserError: there is no token, it is not valid, or the hub cannot be reached.
    """
    from huggingface_hub import HfApi, errors, get_token
    from huggingface_hub.utils.tqdm import disable_progress_bars

    if console.is_muted() or not sys.stderr.isatty():
        disable_progress_bars()
    asset = _asset(repo)
    with _errors(repo):
        if not get_token():
            fix = f"create one on {TOKENS}, then `hf auth login` or `export HF_TOKEN=hf_...`"
            raise asset_error(asset.url, "needs a token that may write", fix)
        try:
            info = hub.retrying(asset, lambda: HfApi().model_info(repo, files_metadata=True))
        except errors.RepositoryNotFoundError:
            return None
    listed = map(RemoteFile.of_sibling, info.siblings or ())
    return Remote(str(info.sha), bool(info.private), {file.name: file for file in listed})


def require_allowed(repo: str, run: Run, public: bool, yes: bool) -> None:
    """Refuse to publish without --public, and to replace anything but a model of this run.

    Raises:
        UserError: the repository is refused.
    """
    where, remote = _asset(repo).url, look(repo)
    if remote is None:
        return
    if not remote.private and not public:
        fix = f"add `--public`, or make it private on {where}/settings"
        raise usage_error(where, "is public, so everybody would see the model", fix)
    if yes or not remote.files.keys() - {".gitattributes"}:
        return
    other = _run_in(repo, remote)
    if other != run_name(run.root):
        what = f"the model of another run, {other}" if other else "files that promote did not push"
        fix = "push to another name, or replace it with `--yes`"
        raise usage_error(where, f"holds {what}", fix)


def _run_in(repo: str, remote: Remote) -> str:
    """Return the name of the run whose model a repository holds, "" if promote did not push it."""
    from huggingface_hub import hf_hub_download

    if not remote.files.keys() >= _MARKS:
        return ""
    with _errors(repo):
        path = hub.retrying(
            _asset(repo),
            lambda: hf_hub_download(repo, paths.MANIFEST_FILE, revision=remote.revision),
        )
    manifest = files.read_json(Path(path))
    return str(manifest.get("run", "")) if isinstance(manifest, dict) else ""


def run_name(run: Path | str) -> str:
    """Return the last folders of a run's path, which name it: project, group and name."""
    return "/".join(Path(run).parts[-3:])


def plan_push(items: Sequence[Item], remote: Remote | None) -> Plan:
    """Return what a push of these files would do."""
    there = remote.files if remote else {}
    unchanged = [item for item in items if item.is_at(there.get(item.name))]
    changed = [item for item in items if item not in unchanged]
    names = {item.name for item in items}
    old = (name for name in there if any(fnmatch.fnmatch(name, pattern) for pattern in _OLD))
    return Plan(changed, unchanged, sorted(set(old) - names))


def preview(repo: str, items: Sequence[Item]) -> dict[str, Any]:
    """Print what a push of these files would do; return its figures."""
    plan = plan_push(items, look(repo))
    plan.say(repo)
    return {"repo": repo, "uploaded": len(plan.changed), "bytes": plan.bytes}


def push(repo: str, items: Sequence[Item], title: str, public: bool) -> dict[str, Any]:
    """Create the repository if needed, upload what differs, commit it, make it public if asked.

    Returns:
        The figures of the push.

    Raises:
        UserError: the token may not write there, the hub cannot be reached, or the repository was
            changed meanwhile.
    """
    from huggingface_hub import HfApi

    api, remote = HfApi(), look(repo)
    if remote is None:
        console.say(f"creating {_asset(repo).url}, private")
        with _errors(repo):
            # Until the commit it must not be seen, so it is made public only at the end.
            hub.retrying(_asset(repo), lambda: api.create_repo(repo, private=True, exist_ok=True))
        remote = look(repo)
        if remote is None:
            raise _forbidden(repo)
    plan = plan_push(items, remote)
    plan.say(repo)
    commit = remote.revision
    if plan.changed or plan.gone:
        with _errors(repo):
            commit = _commit(repo, plan, remote.revision, title)
        _require_complete(repo, items)
    if public and remote.private:
        with _errors(repo):
            hub.retrying(_asset(repo), lambda: api.update_repo_settings(repo, private=False))
    console.say(f"pushed to {_asset(repo).url}, {'public' if public else 'private'}")
    return {
        "repo": repo, "url": _asset(repo).url, "commit": commit, "private": not public,
        "uploaded": len(plan.changed), "bytes": plan.bytes,
    }  # fmt: skip


def _commit(repo: str, plan: Plan, parent: str, title: str) -> str:
    """Upload the large files one by one, then make one commit of all; return its hash."""
    from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi

    api, asset = HfApi(), _asset(repo)
    additions = []
    for item in sorted(plan.changed, key=lambda item: item.size):
        source = item.content if isinstance(item.content, bytes) else str(item.content)
        addition = CommitOperationAdd(item.name, source)
        additions.append(addition)
        console.say(f"uploading {item.name}, {console.size(item.size)}")
        try:
            # The library frees the content of a large file that has arrived.
            _aside(
                lambda: hub.retrying(asset, lambda: api.preupload_lfs_files(repo, [additions[-1]]))
            )
        except RuntimeError as error:
            # The library's own error only names the file.
            if isinstance(error.__cause__, Exception):
                raise error.__cause__ from error
            raise _interrupted(repo, error) from error
    operations: list[Any] = [*additions, *(CommitOperationDelete(name) for name in plan.gone)]
    # A commit that another push made meanwhile is an error, since this one has not seen its files.
    done = hub.retrying(
        asset,
        lambda: api.create_commit(repo, operations, commit_message=title, parent_commit=parent),
    )
    return str(done.oid)


def _aside(call: Callable[[], None]) -> None:
    """Run an upload in a thread, since hf_xet lets no signal through until it is done."""
    from huggingface_hub import errors

    network_error = cast(type[Exception], errors.HfHubHTTPError.__bases__[0])
    ends: list[Exception | None] = []

    def work() -> None:
        try:
            call()
        except (network_error, OSError, RuntimeError, ValueError) as error:
            ends.append(error)
        else:
            ends.append(None)

    # A daemon thread ends with an interrupted process, even while it waits for the network.
    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    thread.join()
    # If this fails, the thread has already printed the traceback of its error.
    assert ends
    if ends[0]:
        raise ends[0]


def _require_complete(repo: str, items: Sequence[Item]) -> None:
    """Check that the hub lists every file with its size; a .gitignore there may leave some out."""
    remote = look(repo)
    there = remote.files if remote else {}
    lacking = [i.name for i in items if i.name not in there or there[i.name].size != i.size]
    if lacking:
        fix = "delete its .gitignore, then run the same command again"
        raise asset_error(_asset(repo).url, f"lacks {', '.join(lacking)} after the push", fix)


@contextmanager
def _errors(repo: str) -> Iterator[None]:
    """Turn the errors of a push into one UserError whose fix completes it.

    Raises:
        UserError: a request failed.
    """
    from huggingface_hub import errors

    try:
        with hub.user_errors(_asset(repo)):
            try:
                yield
            except errors.HfHubHTTPError as error:
                status = error.response.status_code
                if status == 401 and not isinstance(error, errors.RepositoryNotFoundError):
                    raise _forbidden(repo, "the hub does not know the token") from error
                if status == 403:
                    raise _forbidden(repo) from error
                if status in (409, 412):
                    what = "was changed during the push"
                    raise _again(repo, what) from error
                raise
            except ValueError as error:
                # The library's word for an answer that it does not understand.
                raise _interrupted(repo, error) from error
            except OSError as error:
                # The errors of hf_xet have no errno, and a status only in their text.
                if re.search(r"\((401|403) ", str(error)):
                    raise _forbidden(repo) from error
                if error.errno is not None or isinstance(error, ConnectionError):
                    raise
                raise _interrupted(repo, error) from error
    except UserError as error:
        if error.what.startswith((hub.UNREACHABLE, "the hub answered")):
            error.fix += ", then run the same command again: it uploads what is missing"
        raise


def _forbidden(repo: str, what: str = "the token may not write there") -> UserError:
    fix = f"use one with write access from {TOKENS}: `export HF_TOKEN=hf_...`"
    return asset_error(_asset(repo).url, what, fix)


def _interrupted(repo: str, error: Exception) -> UserError:
    return _again(repo, f"the upload failed: {error}")


def _again(repo: str, what: str) -> UserError:
    fix = "run the same command again: it uploads what is missing"
    return asset_error(_asset(repo).url, what, fix)


def _asset(repo: str) -> Asset:
    return Asset(repo, "model", Path(), ())
