"""Weights and dataset of a recipe from the hub, verified. No torch."""

from __future__ import annotations

import hashlib
import os
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from cosmos_cli import console, layout
from cosmos_cli.errors import ExitCode, UserError
from cosmos_cli.layout import Dataset

if TYPE_CHECKING:
    from cosmos_cli.keys import Recipe

MODEL_PATTERNS = ("README.md", "LICENSE*", "model.pt", "config.json")
TOKENIZER_PATTERNS = ("README.md", "config.json", "encoder.jit", "decoder.jit", "mean_std.pt")
TEXT_PATTERNS = ("config.json", "spiece.model", "tokenizer*.json", "pytorch_model.bin")


@dataclass(frozen=True)
class Asset:
    """Some files of one hub repository and the folder they go to."""

    repo: str
    kind: str
    folder: Path
    patterns: tuple[str, ...]
    revision: str | None = None

    @property
    def url(self) -> str:
        """The page where a person reads the licence and asks for access."""
        middle = "datasets/" if self.kind == "dataset" else ""
        return f"https://huggingface.co/{middle}{self.repo}"

    def path(self, name: str) -> Path:
        """Where a file goes: as the hub has it, but the videos of a dataset all into `videos`."""
        if self.kind == "dataset" and Path(name).suffix.lower() in layout.VIDEO_SUFFIXES:
            return self.folder / "videos" / Path(name).name
        return self.folder / name


@dataclass(frozen=True)
class RemoteFile:
    """One file as the hub describes it; `digest` is its sha256, or for small files the git hash."""

    name: str
    size: int
    digest: str
    is_git_hash: bool


def assets(r: Recipe) -> list[Asset]:
    """What the hub has for a recipe; nothing for the embedded model."""
    wanted = []
    if not r.spec.embedded:
        files = layout.model_files(r.spec, r.checkpoints_dir)
        wanted = [
            Asset(f"nvidia/{r.spec.name}", "model", files.dit.parent, MODEL_PATTERNS),
            Asset(f"nvidia/{layout.TOKENIZER_DIR}", "model", files.tokenizer, TOKENIZER_PATTERNS),
            Asset(r.spec.text.name, "model", files.text_encoder, TEXT_PATTERNS),
        ]
    if r.dataset_repo and r.dataset_repo != "embedded":
        patterns = (r.dataset_include or "*",)
        root = Path(r.dataset_dir).absolute()
        wanted.append(Asset(r.dataset_repo, "dataset", root, patterns, r.dataset_revision))
    return wanted


def fetch(asset: Asset, *, dry_run: bool) -> dict[str, Any]:
    """Brings the files of an asset that are missing or damaged; its figures.

    Raises:
        UserError: no access, no network, no such file, no disk, or other bytes than the hub says.
    """
    from huggingface_hub import HfApi

    with _hub_errors(asset):
        info = HfApi().repo_info(
            asset.repo, repo_type=asset.kind, revision=asset.revision, files_metadata=True
        )
    # Repositories of kernels, the third kind, have no siblings; ours are models and datasets.
    siblings: list[Any] = getattr(info, "siblings", None) or []
    files = [
        _remote_file(sibling)
        for sibling in siblings
        if any(fnmatch(sibling.rfilename, pattern) for pattern in asset.patterns)
    ]
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
    missing = [file for file in files if not _is_complete(asset.path(file.name), file)]
    needed = sum(file.size for file in missing)
    total = sum(file.size for file in files)
    console.say(
        f"{asset.repo} at {str(info.sha)[:12]}: {len(files)} files, {console.size(total)}, "
        f"{console.size(needed)} to fetch into {asset.folder}"
    )
    if not dry_run:
        layout.require_free(
            asset.folder,
            needed,
            f"{len(missing)} files",
            "free some space, or set checkpoints_dir or dataset_dir",
        )
        with console.progress(asset.repo, len(missing), "files") as bar:
            for file in missing:
                _fetch_file(asset, file, str(info.sha))
                bar.advance(file.name)
    return {"repo": asset.repo, "revision": info.sha, "bytes": total, "fetched": needed}


def _remote_file(sibling: Any) -> RemoteFile:
    lfs = sibling.lfs
    if lfs:
        return RemoteFile(sibling.rfilename, lfs.size, lfs.sha256, is_git_hash=False)
    return RemoteFile(sibling.rfilename, sibling.size, sibling.blob_id, is_git_hash=True)


def _fetch_file(asset: Asset, file: RemoteFile, revision: str) -> None:
    from huggingface_hub import hf_hub_download

    path = asset.path(file.name)
    arrival = asset.folder / file.name
    with _hub_errors(asset), layout.disk_errors(path):
        arrival.unlink(missing_ok=True)
        hf_hub_download(
            asset.repo,
            file.name,
            repo_type=asset.kind,
            revision=revision,
            local_dir=asset.folder,
        )
    if not _is_complete(arrival, file):
        arrival.unlink(missing_ok=True)
        raise UserError(
            "the hub sent other bytes than it announced; the file was removed",
            code=ExitCode.ASSET,
            where=str(path),
            fix="run the same command again",
        )
    with layout.disk_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        arrival.rename(path)


def _is_complete(path: Path, file: RemoteFile) -> bool:
    """Whether the file on disk is the hub's, by size and hash."""
    if not path.is_file() or path.stat().st_size != file.size:
        return False
    if not file.is_git_hash:
        return layout.sha256_file(path) == file.digest
    content = path.read_bytes()
    header = f"blob {len(content)}\0".encode()
    return hashlib.sha1(header + content, usedforsecurity=False).hexdigest() == file.digest


@contextmanager
def _hub_errors(asset: Asset) -> Iterator[None]:
    """Turns what the hub answers into one line with the remedy and the right page."""
    from huggingface_hub import errors

    # Of httpx or httpx2, whichever this version of the hub's library stands on.
    transport_error = cast(type[Exception], errors.HfHubHTTPError.__bases__[0])

    def bad(what: str, fix: str) -> UserError:
        return UserError(what, code=ExitCode.ASSET, where=asset.url, fix=fix)

    try:
        yield
    except errors.GatedRepoError as error:
        if os.environ.get("HF_TOKEN"):
            raise bad("your account has no access", "accept the licence on that page") from error
        raise bad("needs a token", "accept the licence there and set HF_TOKEN") from error
    except errors.RepositoryNotFoundError as error:
        raise bad("does not exist, or is private", "check the name, set HF_TOKEN") from error
    except errors.RevisionNotFoundError as error:
        raise bad("has no such revision", "check dataset_revision") from error
    except errors.EntryNotFoundError as error:
        raise bad(f"has no such file: {error}", "check the revision") from error
    except errors.HFValidationError as error:
        raise bad("is no name of a repository", "check dataset_repo") from error
    except errors.HfHubHTTPError as error:
        raise bad(f"the hub answered: {error}", "try again later") from error
    except (transport_error, errors.OfflineModeIsEnabled, ConnectionError) as error:
        fix = "check the network, HF_ENDPOINT and HF_HUB_OFFLINE"
        raise bad(f"cannot be reached: {type(error).__name__}", fix) from error


def count_videos(r: Recipe) -> int:
    """The number of videos of the dataset.

    Raises:
        UserError: there is none.
    """
    dataset = Dataset.at(r.dataset_dir, r.videos_dir)
    count = len(dataset.video_files())
    if not count:
        raise UserError(
            "holds no videos",
            code=ExitCode.DATASET,
            where=str(dataset.videos),
            fix="put your videos there, or set videos_dir",
        )
    return count
