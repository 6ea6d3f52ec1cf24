"""Weights and dataset of a recipe from the hub, verified. No torch."""

from __future__ import annotations

import fcntl
import hashlib
import math
import os
import shutil
import threading
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import astuple, dataclass
from fnmatch import filter as filter_names
from fnmatch import fnmatch
from pathlib import Path
from typing import Any, TypeVar, cast

from cosmos_cli import console, files
from cosmos_cli.download import assets, t5
from cosmos_cli.download.assets import Asset, RemoteFile
from cosmos_cli.errors import ExitCode, UserError, together

T = TypeVar("T")

# Threads that fetch share one progress bar.
_COUNTING = threading.Lock()

# What a busy hub answers, and how long to wait before each further try, in seconds.
BUSY = frozenset({408, 429, 500, 502, 503, 504})
WAITS = (1, 2, 4, 8, 16, 32, 60)
# Files of a repository that are fetched side by side.
AT_ONCE = 4
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
    def room(self) -> int:
        """Bytes on disk while they arrive; T5's encoder is less than half of Google's file."""
        originals = (file for file in self.missing if file.name == assets.TEXT_ORIGINAL)
        return self.needed + sum(file.size // 2 for file in originals)

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
        raise together(problems)
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
        device = files.nearest_existing(listing.asset.folder).stat().st_dev
        on_disk[device].append(listing)
    for group in on_disk.values():
        files.require_free(
            group[0].asset.folder,
            sum(listing.room for listing in group),
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
    listed = _matching(asset, _recorded(asset)[1])
    return bool(listed) and all(
        any(files.size_of(path) == form.size for path, form in _forms(asset, f)) for f in listed
    )


def damaged(wanted: Sequence[Asset]) -> list[Asset]:
    """Those that were fetched before and are not as they came; reads every file, asks nobody."""
    known = {asset: _matching(asset, _recorded(asset)[1]) for asset in wanted}
    if count := sum(map(len, known.values())):
        console.say(f"comparing {count} files with what was fetched")
    return [asset for asset, listed in known.items() if _missing(asset, listed)]


def _forms(asset: Asset, file: RemoteFile) -> Iterator[tuple[Path, RemoteFile]]:
    """Where a file may lie, with the size and hash it has there: converted, or as it came."""
    yield from t5.converted(asset, file)
    yield asset.path(file.name), file


def _look(asset: Asset) -> Listing:
    from huggingface_hub import HfApi

    # Where the recipe names no revision, the one that came first stays the one.
    revision, known = _recorded(asset)
    wanted = asset.revision or revision or None
    try:
        with _hub_errors(asset):
            info = _retrying(
                asset,
                lambda: HfApi().repo_info(
                    asset.repo, repo_type=asset.kind, revision=wanted, files_metadata=True
                ),
            )
    except UserError as error:
        # Without a network, what was fetched before and is whole will do.
        listed = _matching(asset, known)
        if not error.what.startswith(UNREACHABLE) or not listed or _missing(asset, listed):
            raise
        return Listing(asset, revision, listed, [])
    # Repositories of kernels, the third kind, have no siblings; ours are models and datasets.
    siblings: list[Any] = getattr(info, "siblings", None) or []
    listed = _matching(asset, [_remote_file(sibling) for sibling in siblings])
    names = [file.name for file in listed]
    weights = [pattern for pattern in asset.patterns if pattern.endswith(assets.WEIGHTS)]
    lacking = [pattern for pattern in weights if not filter_names(names, pattern)]
    if lacking or not listed:
        raise UserError(
            f"has no file like {', '.join(lacking or asset.patterns)}",
            code=ExitCode.ASSET,
            where=asset.url,
            fix="check the name and the revision",
        )
    placed = Counter(asset.path(file.name) for file in listed)
    if twice := [path.name for path, count in placed.items() if count > 1]:
        raise UserError(
            f"has several files named {twice[0]}, and videos lie in one folder",
            code=ExitCode.ASSET,
            where=asset.url,
            fix="choose some of them with dataset_include",
        )
    return Listing(asset, str(info.sha), listed, _missing(asset, listed))


def _matching(asset: Asset, listed: Sequence[RemoteFile]) -> list[RemoteFile]:
    return [f for f in listed if any(fnmatch(f.name, pattern) for pattern in asset.patterns)]


def _missing(asset: Asset, listed: Sequence[RemoteFile]) -> list[RemoteFile]:
    return [f for f in listed if not any(form.is_at(path) for path, form in _forms(asset, f))]


def _remote_file(sibling: Any) -> RemoteFile:
    lfs = sibling.lfs
    if lfs:
        return RemoteFile(sibling.rfilename, lfs.size, lfs.sha256, is_git_hash=False)
    return RemoteFile(sibling.rfilename, sibling.size, sibling.blob_id, is_git_hash=True)


# --- fetching -------------------------------------------------------------------------------------


def fetch(listing: Listing) -> None:
    """Brings the files of an asset that are missing or damaged, several at a time.

    Raises:
        UserError: no access, no network, no such file, no disk, or other bytes than the hub says.
    """
    asset = listing.asset
    if listing.missing:
        with _alone_in(asset):
            # Another process may have brought them meanwhile.
            missing = _missing(asset, listing.missing)
            with console.progress(asset.repo, _megabytes(missing), "MB") as bar:
                _fetch_files(listing, missing, bar)
            shutil.rmtree(asset.arrivals, ignore_errors=True)
            _write_record(listing)
    # Files that were copied here by hand are known from now on; a shared folder stays as it is.
    elif not is_recorded(asset) and os.access(asset.folder, os.W_OK):
        _write_record(listing)
    originals = [file for file in listing.files if file.name == assets.TEXT_ORIGINAL]
    if originals and os.access(asset.folder, os.W_OK):
        with _alone_in(asset):
            t5.convert(asset, originals[0])


def _fetch_files(listing: Listing, listed: Sequence[RemoteFile], bar: console.Progress) -> None:
    """Brings files side by side; after a failure none is begun, those under way still arrive."""
    problems: list[UserError] = []
    done = []
    # A list's iterator gives each of its items to one thread alone.
    left = iter(listed)

    def work() -> None:
        for file in left:
            if problems:
                return
            try:
                _fetch_file(listing, file, _counter(bar, file))
            except UserError as error:
                problems.append(error)
            else:
                done.append(file)

    # As daemons they end with the process when it is interrupted, whatever they wait for.
    threads = [threading.Thread(target=work, daemon=True) for _ in listed[:AT_ONCE]]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if problems:
        raise together(problems)
    # The traceback of what went wrong instead has been printed by its thread.
    assert len(done) == len(listed)


def _fetch_file(listing: Listing, file: RemoteFile, counter: type) -> None:
    from huggingface_hub import hf_hub_download

    asset = listing.asset
    path, arrival = asset.path(file.name), asset.arrivals / file.name
    with files.disk_errors(path):
        if not file.is_at(arrival):
            arrival.unlink(missing_ok=True)
            _take_from_cache(listing, file, arrival)
    if not arrival.exists():
        with _hub_errors(asset), files.disk_errors(path):
            _retrying(
                asset,
                lambda: hf_hub_download(
                    asset.repo,
                    file.name,
                    repo_type=asset.kind,
                    revision=listing.revision,
                    local_dir=asset.arrivals,
                    # Not the shared cache, from which the library would copy what it never checks.
                    cache_dir=asset.arrivals / files.CACHE_DIR,
                    tqdm_class=counter,
                ),
            )
    if not file.is_at(arrival):
        arrival.unlink(missing_ok=True)
        raise UserError(
            "the hub sent other bytes than it announced; the file was removed",
            code=ExitCode.ASSET,
            where=str(path),
            fix="run the same command again",
        )
    _compare_published(asset, file, arrival)
    if asset.target:
        t5.require_encoder(arrival, asset)
    with files.disk_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        files.sync(arrival)
        arrival.replace(path)


def _take_from_cache(listing: Listing, file: RemoteFile, arrival: Path) -> None:
    """Links or copies a whole file that another program left in the hub's cache."""
    from huggingface_hub import try_to_load_from_cache

    asset = listing.asset
    found = try_to_load_from_cache(
        asset.repo, file.name, revision=listing.revision, repo_type=asset.kind
    )
    if isinstance(found, str) and file.is_at(Path(found)):
        arrival.parent.mkdir(parents=True, exist_ok=True)
        try:
            arrival.hardlink_to(Path(found).resolve())
        except OSError:
            # On another disk, or of another user.
            shutil.copyfile(found, arrival)


def _compare_published(asset: Asset, file: RemoteFile, path: Path) -> None:
    published = assets.PUBLISHED_MD5.get(asset.repo, {}).get(path.name)
    if published:
        with files.open_regular(path, files.WEIGHTS) as stream:
            found = hashlib.file_digest(stream, "md5").hexdigest()
        if found != published:
            console.warn(
                f"{asset.repo}: {file.name} is as the hub has it, but not the one that this "
                f"version was written for: MD5 {found} instead of {published}"
            )


def _megabytes(listed: Sequence[RemoteFile]) -> int:
    return math.ceil(sum(file.size for file in listed) / 1e6)


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
            with _COUNTING:
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


# --- what a folder remembers of its downloads -----------------------------------------------------


@contextmanager
def _alone_in(asset: Asset) -> Iterator[None]:
    """Waits until no other process fetches into the folder, then clears what a killed one left."""
    lock = asset.notes / "lock"
    with files.disk_errors(lock):
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
    listed = {file.name: astuple(file) for file in [*kept, *listing.files]}
    record = {
        "url": asset.url,
        "asked_for": asset.revision,
        "revision": listing.revision,
        "files": list(listed.values()),
    }
    files.write_json(asset.record, record)


def _recorded(asset: Asset) -> tuple[str, list[RemoteFile]]:
    """Commit and files of the last download; none when it was of another revision."""
    if not asset.record.is_file():
        return "", []
    record = files.read_json(asset.record)
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
        held = f"delete {asset.record} to take the newest"
        fix = "check dataset_revision" if asset.revision else held
        raise bad("has no such revision", fix) from error
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
