"""Weights and dataset of a recipe from the hub, verified. No torch."""

from __future__ import annotations

import fcntl
import hashlib
import math
import os
import shutil
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import astuple, dataclass
from fnmatch import fnmatch
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar, cast

from cosmos_cli import assets, console, layout, lerobot
from cosmos_cli.assets import Asset, RemoteFile
from cosmos_cli.errors import ExitCode, UserError
from cosmos_cli.layout import Dataset

if TYPE_CHECKING:
    from cosmos_cli.keys import Recipe

T = TypeVar("T")

# What a busy hub answers, and how long to wait before each further try, in seconds.
BUSY = frozenset({408, 429, 500, 502, 503, 504})
WAITS = (1, 2, 4, 8, 16, 32, 60)
UNREACHABLE = "cannot be reached"


@dataclass(frozen=True)
class Listing:
    """What an asset consists of at one commit, and which of it is missing or damaged here."""

    asset: Asset
    revision: str
    files: list[RemoteFile]
    missing: list[RemoteFile]

    @property
    def total(self) -> int:
        """Bytes of all files."""
        return sum(file.size for file in self.files)

    @property
    def needed(self) -> int:
        """Bytes that are to be fetched."""
        return sum(file.size for file in self.missing)

    @property
    def figures(self) -> dict[str, Any]:
        """What --json says of it."""
        return {
            "repo": self.asset.repo,
            "revision": self.revision,
            "bytes": self.total,
            "fetched": self.needed,
        }


# --- before the first byte ------------------------------------------------------------------------


def survey(wanted: Sequence[Asset]) -> list[Listing]:
    """What is to be fetched, said aloud; nothing of it is fetched.

    Raises:
        UserError: one error for all repositories that cannot be had.
    """
    listings, problems = [], []
    for asset in wanted:
        try:
            listing = _look(asset)
            if listing.missing:
                require_access(asset)
        except UserError as error:
            problems.append(error)
            continue
        listings.append(listing)
        # Whoever is asked to trust the file should see where it comes from.
        note = f", from a third party, read as {asset.target}" if asset.target else ""
        console.say(
            f"{asset.repo} at {listing.revision[:12]}: {len(listing.files)} files, "
            f"{console.size(listing.total)}, {console.size(listing.needed)} to fetch "
            f"into {asset.folder}{note}"
        )
    if problems:
        first, *others = problems
        raise UserError(
            first.what, code=first.code, where=first.where, fix=first.fix, also=tuple(others)
        )
    if listings:
        total, needed = (sum(getattr(x, key) for x in listings) for key in ("total", "needed"))
        console.say(f"in all {console.size(total)}, {console.size(needed)} to fetch")
    return listings


def require_room(listings: Sequence[Listing]) -> None:
    """Refuses to begin what would not fit.

    Raises:
        UserError: a disk has less room than all that goes to it.
    """
    on_disk = defaultdict(list)
    for listing in listings:
        device = layout.nearest_existing(listing.asset.folder).stat().st_dev
        on_disk[device].append(listing)
    for group in on_disk.values():
        layout.require_free(
            group[0].asset.folder,
            sum(listing.needed for listing in group),
            f"{sum(len(listing.missing) for listing in group)} files",
            "free some space, or set checkpoints_dir or dataset_dir",
        )


def require_access(asset: Asset) -> None:
    """Asks the hub whether this account may read a repository.

    Raises:
        UserError: it may not, or the hub cannot be reached.
    """
    from huggingface_hub import HfApi, errors

    with _hub_errors(asset):
        try:
            HfApi().auth_check(asset.repo, repo_type=asset.kind)
        except errors.RepositoryNotFoundError:
            raise
        except errors.HfHubHTTPError as error:
            # A mirror need not know this question, and a busy hub says later what it thinks.
            if error.response.status_code in (401, 403):
                raise


def is_recorded(asset: Asset) -> bool:
    """Whether the files were fetched and still have their sizes; asks nobody and reads no file."""
    files = _matching(asset, _recorded(asset)[1])
    return bool(files) and all(layout.size_of(asset.path(f.name)) == f.size for f in files)


def _look(asset: Asset) -> Listing:
    from huggingface_hub import HfApi

    assets.require_one_encoder(asset)
    try:
        with _hub_errors(asset):
            info = _retrying(
                asset,
                lambda: HfApi().repo_info(
                    asset.repo, repo_type=asset.kind, revision=asset.revision, files_metadata=True
                ),
            )
    except UserError as error:
        # Without a network, what was fetched before and is whole will do.
        revision, known = _recorded(asset)
        files = _matching(asset, known)
        if not error.what.startswith(UNREACHABLE) or not files or _missing(asset, files):
            raise
        return Listing(asset, revision, files, [])
    # Repositories of kernels, the third kind, have no siblings; ours are models and datasets.
    siblings: list[Any] = getattr(info, "siblings", None) or []
    files = _matching(asset, [_remote_file(sibling) for sibling in siblings])
    if not files:
        raise UserError(
            f"has no file like {', '.join(asset.patterns)}",
            code=ExitCode.ASSET,
            where=asset.url,
            fix="check the name and the revision",
        )
    placed = Counter(asset.path(file.name) for file in files)
    if twice := [path.name for path, count in placed.items() if count > 1]:
        raise UserError(
            f"has several files named {twice[0]}, and videos lie in one folder",
            code=ExitCode.ASSET,
            where=asset.url,
            fix="choose some of them with dataset_include",
        )
    return Listing(asset, str(info.sha), files, _missing(asset, files))


def _matching(asset: Asset, files: Sequence[RemoteFile]) -> list[RemoteFile]:
    return [f for f in files if any(fnmatch(f.name, pattern) for pattern in asset.patterns)]


def _missing(asset: Asset, files: Sequence[RemoteFile]) -> list[RemoteFile]:
    return [file for file in files if not _is_complete(asset.path(file.name), file)]


def _remote_file(sibling: Any) -> RemoteFile:
    lfs = sibling.lfs
    if lfs:
        return RemoteFile(sibling.rfilename, lfs.size, lfs.sha256, is_git_hash=False)
    return RemoteFile(sibling.rfilename, sibling.size, sibling.blob_id, is_git_hash=True)


# --- fetching -------------------------------------------------------------------------------------


def fetch(listing: Listing) -> None:
    """Brings the files of an asset that are missing or damaged.

    Raises:
        UserError: no access, no network, no such file, no disk, or other bytes than the hub says.
    """
    asset = listing.asset
    if not listing.missing:
        # Files that were copied here by hand are known from now on; a shared folder stays as it is.
        if not is_recorded(asset) and os.access(asset.folder, os.W_OK):
            _write_record(listing)
        return
    with _alone_in(asset):
        # Another process may have brought them meanwhile.
        missing = _missing(asset, listing.missing)
        with console.progress(asset.repo, _megabytes(missing), "MB") as bar:
            for file in missing:
                _fetch_file(listing, file, _counter(bar, file))
        shutil.rmtree(asset.arrivals, ignore_errors=True)
        _write_record(listing)


def _fetch_file(listing: Listing, file: RemoteFile, counter: type) -> None:
    from huggingface_hub import hf_hub_download

    asset = listing.asset
    path, arrival = asset.path(file.name), asset.arrivals / file.name
    if not _is_complete(arrival, file):
        with _hub_errors(asset), layout.disk_errors(path):
            arrival.unlink(missing_ok=True)
            _retrying(
                asset,
                lambda: hf_hub_download(
                    asset.repo,
                    file.name,
                    repo_type=asset.kind,
                    revision=listing.revision,
                    local_dir=asset.arrivals,
                    tqdm_class=counter,
                ),
            )
    if not _is_complete(arrival, file):
        arrival.unlink(missing_ok=True)
        raise UserError(
            "the hub sent other bytes than it announced; the file was removed",
            code=ExitCode.ASSET,
            where=str(path),
            fix="run the same command again",
        )
    if asset.target:
        assets.require_t5(arrival, asset)
    with layout.disk_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        layout.sync(arrival)
        arrival.replace(path)


def _megabytes(files: Sequence[RemoteFile]) -> int:
    return math.ceil(sum(file.size for file in files) / 1e6)


def _counter(bar: console.Progress, file: RemoteFile) -> type:
    """The class of progress bar that huggingface_hub makes; it tells ours the megabytes."""
    from huggingface_hub.utils.tqdm import tqdm

    class Counting(tqdm):
        def __init__(self, *arguments: Any, **options: Any) -> None:
            super().__init__(  # type: ignore[no-untyped-call]
                *arguments, **{**options, "disable": True}
            )
            self.arrived = int(options.get("initial") or 0)

        def update(self, count: float | None = 1) -> None:
            before = self.arrived // 10**6
            self.arrived += int(count or 0)
            bar.advance(file.name, self.arrived // 10**6 - before)

    return Counting


def _retrying(asset: Asset, call: Callable[[], T]) -> T:
    """What the call returns; waits and tries again while the hub says that it is busy."""
    from huggingface_hub import errors

    for seconds in WAITS:
        try:
            return call()
        except (errors.HfHubHTTPError, errors.LocalEntryNotFoundError) as error:
            # The library hides what it could not ask of a file behind "not in the cache".
            response = getattr(error, "response", None) or getattr(
                error.__cause__, "response", None
            )
            if response is None or response.status_code not in BUSY:
                raise
            wait = response.headers.get("Retry-After", "")
            pause = min(max(seconds, int(wait) if wait.isdigit() else 0), WAITS[-1])
            console.warn(
                f"{asset.repo}: the hub answered {response.status_code}, next try in {pause} s"
            )
            time.sleep(pause)
    return call()


def _is_complete(path: Path, file: RemoteFile) -> bool:
    """Whether the file on disk is the hub's, by size and hash."""
    if not path.is_file() or path.stat().st_size != file.size:
        return False
    if not file.is_git_hash:
        return layout.sha256_file(path) == file.digest
    content = path.read_bytes()
    header = f"blob {len(content)}\0".encode()
    return hashlib.sha1(header + content, usedforsecurity=False).hexdigest() == file.digest


# --- what a folder remembers of its downloads -----------------------------------------------------


@contextmanager
def _alone_in(asset: Asset) -> Iterator[None]:
    """Waits until no other process fetches into the folder, then clears what a killed one left."""
    lock = asset.notes / "lock"
    with layout.disk_errors(lock):
        lock.parent.mkdir(parents=True, exist_ok=True)
        stream = lock.open("a")
    with stream:
        try:
            fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            console.say(f"another process fetches into {asset.folder}; waiting for it")
            fcntl.flock(stream, fcntl.LOCK_EX)
        # Halves of files; nothing could go on with them.
        shutil.rmtree(asset.arrivals / ".cache", ignore_errors=True)
        yield


def _write_record(listing: Listing) -> None:
    """Adds the files to what is known of the repository."""
    asset = listing.asset
    revision, known = _recorded(asset)
    kept = known if revision == listing.revision else []
    files = {file.name: astuple(file) for file in [*kept, *listing.files]}
    record = {
        "url": asset.url,
        "asked_for": asset.revision,
        "revision": listing.revision,
        "files": list(files.values()),
    }
    layout.write_json(asset.record, record)


def _recorded(asset: Asset) -> tuple[str, list[RemoteFile]]:
    """Commit and files of the last download; none when it was of another revision."""
    if not asset.record.is_file():
        return "", []
    record = layout.read_json(asset.record)
    if asset.revision not in (record["asked_for"], record["revision"]):
        return "", []
    return record["revision"], [RemoteFile(*file) for file in record["files"]]


# --- errors ---------------------------------------------------------------------------------------


@contextmanager
def _hub_errors(asset: Asset) -> Iterator[None]:
    """Turns what the hub answers into one line with the remedy and the right page."""
    from huggingface_hub import errors, get_token

    # Of httpx or httpx2, whichever this version of the hub's library stands on.
    transport_error = cast(type[Exception], errors.HfHubHTTPError.__bases__[0])

    def bad(what: str, fix: str) -> UserError:
        return UserError(what, code=ExitCode.ASSET, where=asset.url, fix=fix)

    def unreachable(error: Exception) -> UserError:
        fix = "check the network, HF_ENDPOINT and HF_HUB_OFFLINE"
        return bad(f"{UNREACHABLE}: {type(error).__name__}", fix)

    try:
        yield
    except errors.GatedRepoError as error:
        if get_token():
            raise bad("your account has no access", "accept the licence on that page") from error
        raise bad("needs a token", "accept the licence there and set HF_TOKEN") from error
    except errors.RepositoryNotFoundError as error:
        raise bad("does not exist, or is private", "check the name, set HF_TOKEN") from error
    except errors.RevisionNotFoundError as error:
        raise bad("has no such revision", "check dataset_revision") from error
    except errors.LocalEntryNotFoundError as error:
        raise unreachable(error) from error
    except errors.EntryNotFoundError as error:
        raise bad(f"has no such file: {error}", "check the revision") from error
    except errors.HFValidationError as error:
        raise bad("is no name of a repository", "check dataset_repo") from error
    except errors.HfHubHTTPError as error:
        raise bad(f"the hub answered: {error}", "try again later") from error
    except (transport_error, errors.OfflineModeIsEnabled, ConnectionError) as error:
        raise unreachable(error) from error
    except OSError as error:
        if error.errno is not None:
            raise
        # How the library says that fewer bytes came than were announced.
        raise bad("sent a part of a file", "run the same command again") from error


def count_videos(r: Recipe) -> int:
    """The number of videos of the dataset.

    Raises:
        UserError: there is none.
    """
    dataset = Dataset.at(r.dataset_dir, r.videos_dir)
    if lerobot.is_lerobot(dataset.videos):
        return len(lerobot.episodes(dataset.videos, r.camera))
    count = len(dataset.video_files())
    if not count:
        raise UserError(
            "holds no videos",
            code=ExitCode.DATASET,
            where=str(dataset.videos),
            fix="put your videos there, or set videos_dir",
        )
    return count
