"""Download the weights and dataset of a recipe from the hub, and verify them. No torch."""

from __future__ import annotations

import hashlib
import math
import os
import shutil
import threading
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import astuple, dataclass
from fnmatch import filter as filter_names
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from cosmos_cli import console, files, locks
from cosmos_cli.download import assets, hub, t5
from cosmos_cli.download.assets import Asset, RemoteFile
from cosmos_cli.errors import UserError, asset_error, together

# The download threads share one progress bar.
_COUNTING = threading.Lock()

# The number of files of a repository that are downloaded in parallel.
AT_ONCE = 4


@dataclass(frozen=True)
class Listing:
    """The files of an asset at one commit, and those that are missing or damaged here."""

    asset: Asset
    revision: str
    files: list[RemoteFile]
    missing: list[RemoteFile]
    licence: str = ""

    @property
    def total(self) -> int:
        """Bytes of all files."""
        return sum(file.size for file in self.files)

    @property
    def needed(self) -> int:
        """Bytes that must be downloaded."""
        return sum(file.size for file in self.missing)

    @property
    def room(self) -> int:
        """Bytes of disk space that the download needs.

        Google's T5 file is also converted. The encoder takes less than half of it.
        """
        originals = (file for file in self.missing if file.name == assets.TEXT_ORIGINAL)
        return self.needed + sum(file.size // 2 for file in originals)

    @property
    def figures(self) -> dict[str, Any]:
        """The listing as fields for --json."""
        return {
            "repo": self.asset.repo,
            "revision": self.revision,
            "bytes": self.total,
            "fetched": self.needed,
            "licence": self.licence,
        }


# --- before the first byte ------------------------------------------------------------------------


def survey(wanted: Sequence[Asset]) -> list[Listing]:
    """Print and return what must be downloaded, without downloading it.

    Raises:
        UserError: one error for all repositories that cannot be read.
    """
    listings, problems = [], []
    for asset in wanted:
        try:
            listing = _look(asset)
            if listing.missing:
                hub.require_access(asset)
        except UserError as error:
            problems.append(error)
            continue
        listings.append(listing)
        # Show the user that this file comes from a third party.
        note = f", from a third party, stored as {asset.target}" if asset.target else ""
        licence = f"licence {listing.licence}, " if listing.licence else ""
        console.say(
            f"{asset.repo} at {listing.revision[:12]}: {licence}{len(listing.files)} files, "
            f"{console.size(listing.total)}, {console.size(listing.needed)} to download "
            f"to {asset.folder}{note}"
        )
    if problems:
        raise together(_merged(problems))
    if listings:
        total, needed = (sum(getattr(x, key) for x in listings) for key in ("total", "needed"))
        console.say(f"in all {console.size(total)}, {console.size(needed)} to download")
    return listings


def _merged(problems: list[UserError]) -> list[UserError]:
    """Return the problems, with one line for all that the hub cannot be reached for."""
    unreachable = [error for error in problems if error.what.startswith(hub.UNREACHABLE)]
    if len(unreachable) < 2:
        return problems
    first, *rest = unreachable
    first.what += f" ({len(rest)} more likewise)"
    return [first, *(error for error in problems if error not in unreachable)]


def require_room(listings: Sequence[Listing]) -> None:
    """Check that each disk has room for its downloads.

    Raises:
        UserError: a disk has too little room for all files that go to it.
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
            "free some space, or use `--set checkpoints_dir=FOLDER` or `--set dataset_dir=FOLDER`",
        )


def is_recorded(asset: Asset) -> bool:
    """True if all files were downloaded and still have their sizes. Uses no network or hashes."""
    listed = _matching(asset, _recorded(asset)[1])
    return bool(listed) and all(
        any(files.size_of(path) == form.size for path, form in _forms(asset, f)) for f in listed
    )


def damaged(wanted: Sequence[Asset]) -> list[Asset]:
    """Return the assets whose files changed since the download. Hashes all, uses no network."""
    known = {asset: _matching(asset, _recorded(asset)[1]) for asset in wanted}
    if count := sum(map(len, known.values())):
        console.say(f"comparing {count} files with the hashes recorded when they were downloaded")
    return [asset for asset, listed in known.items() if _missing(asset, listed)]


def _forms(asset: Asset, file: RemoteFile) -> Iterator[tuple[Path, RemoteFile]]:
    """Yield the paths where a file may be, converted or original, with its size and hash there."""
    yield from t5.converted(asset, file)
    yield asset.path(file.name), file


def _look(asset: Asset) -> Listing:
    from huggingface_hub import HfApi

    # If the recipe names no revision, stay at the one that was downloaded first.
    revision, known = _recorded(asset)
    wanted = asset.revision or revision or None
    try:
        with hub.user_errors(asset):
            info = hub.retrying(
                asset,
                lambda: HfApi().repo_info(
                    asset.repo, repo_type=asset.kind, revision=wanted, files_metadata=True
                ),
            )
    except UserError as error:
        # Without a network, an earlier and complete download is enough.
        listed = _matching(asset, known)
        if not error.what.startswith(hub.UNREACHABLE) or not listed or _missing(asset, listed):
            raise
        return Listing(asset, revision, listed, [])
    # Only kernel repositories have no attribute `siblings`. Ours are models and datasets.
    siblings: list[Any] = getattr(info, "siblings", None) or []
    listed = _matching(asset, list(map(RemoteFile.of_sibling, siblings)))
    names = [file.name for file in listed]
    weights = [pattern for pattern in asset.patterns if pattern.endswith(assets.WEIGHTS)]
    lacking = [pattern for pattern in weights if not filter_names(names, pattern)]
    if lacking or not listed:
        what = f"has no file like {', '.join(lacking or asset.patterns)}"
        raise asset_error(asset.url, what, "check the name and the revision")
    placed = Counter(asset.path(file.name) for file in listed)
    if twice := [path.name for path, count in placed.items() if count > 1]:
        what = f"has several files named {twice[0]}, but all videos go to one folder"
        fix = "match only one of them with `--set dataset_include=PATTERN`"
        raise asset_error(asset.url, what, fix)
    tags: list[str] = getattr(info, "tags", None) or []
    licence = next((t.removeprefix("license:") for t in tags if t.startswith("license:")), "")
    return Listing(asset, str(info.sha), listed, _missing(asset, listed), licence)


def _matching(asset: Asset, listed: Sequence[RemoteFile]) -> list[RemoteFile]:
    return [f for f in listed if any(fnmatch(f.name, pattern) for pattern in asset.patterns)]


def _missing(asset: Asset, listed: Sequence[RemoteFile]) -> list[RemoteFile]:
    return [f for f in listed if not any(form.is_at(path) for path, form in _forms(asset, f))]


# --- fetching -------------------------------------------------------------------------------------


def fetch(listing: Listing) -> None:
    """Download the missing and damaged files of an asset, several in parallel.

    Raises:
        UserError: no access, no network, no such file, a full disk, or content that does not match
            the hub's hash.
    """
    asset = listing.asset
    if listing.missing:
        with _alone_in(asset):
            # Another process may have downloaded them while we waited for the lock.
            missing = _missing(asset, listing.missing)
            megabytes = math.ceil(sum(file.size for file in missing) / 1e6)
            with console.progress(asset.repo, megabytes, "MB") as bar:
                _fetch_files(listing, missing, bar)
            shutil.rmtree(asset.arrivals, ignore_errors=True)
            _write_record(listing)
    # Record files that were copied here by hand. A read-only shared folder stays as it is.
    elif not is_recorded(asset) and os.access(asset.folder, os.W_OK):
        _write_record(listing)
    originals = [file for file in listing.files if file.name == assets.TEXT_ORIGINAL]
    if originals and os.access(asset.folder, os.W_OK):
        with _alone_in(asset):
            t5.convert(asset, originals[0])


def _fetch_files(listing: Listing, listed: Sequence[RemoteFile], bar: console.Progress) -> None:
    """Download files in parallel. After a failure, finish the current ones but start no more."""
    problems: list[UserError] = []
    done = []
    # The threads share this iterator. A list iterator hands each item to exactly one thread.
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

    # Daemon threads end with an interrupted process, even while they wait for the network.
    threads = [threading.Thread(target=work, daemon=True) for _ in listed[:AT_ONCE]]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if problems:
        raise together(_merged(problems))
    # If this fails, a thread has already printed the traceback of its error.
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
        with hub.user_errors(asset), files.disk_errors(path):
            hub.retrying(
                asset,
                lambda: hf_hub_download(
                    asset.repo,
                    file.name,
                    repo_type=asset.kind,
                    revision=listing.revision,
                    local_dir=asset.arrivals,
                    # Avoid the shared cache: the library copies from it without checking hashes.
                    cache_dir=asset.arrivals / files.CACHE_DIR,
                    tqdm_class=counter,
                ),
            )
    if not file.is_at(arrival):
        arrival.unlink(missing_ok=True)
        what = "the hub sent other bytes than it announced; the file was deleted"
        raise asset_error(path, what, "run the same command again")
    _compare_published(asset, file, arrival)
    if asset.target:
        t5.require_encoder(arrival, asset)
    with files.disk_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        files.sync(arrival)
        arrival.replace(path)


def _take_from_cache(listing: Listing, file: RemoteFile, arrival: Path) -> None:
    """Link or copy a file that another program downloaded to the hub cache, if it is complete."""
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
            # The cached file is on another disk or belongs to another user.
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


def _counter(bar: console.Progress, file: RemoteFile) -> type:
    """Return a progress bar class for huggingface_hub that adds its megabytes to our bar."""
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


# --- download records -----------------------------------------------------------------------------


@contextmanager
def _alone_in(asset: Asset) -> Iterator[None]:
    """Lock the folder against other downloads, and delete the partial files of a killed one."""
    waiting = f"another process is downloading to {asset.folder}; waiting for it"
    with locks.held(asset.notes / "lock", "cosmos download", waiting):
        # Partial files: a download cannot resume from them.
        shutil.rmtree(asset.arrivals / ".cache", ignore_errors=True)
        yield


def _write_record(listing: Listing) -> None:
    """Add the files to the record of the repository."""
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
    """Return the commit and files of the last download, none if it was of another revision."""
    if not asset.record.is_file():
        return "", []
    record = files.read_json(asset.record)
    if asset.revision not in (record["asked_for"], record["revision"]):
        return "", []
    return record["revision"], [RemoteFile(*file) for file in record["files"]]
