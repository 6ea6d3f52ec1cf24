"""Ask the hub: wait while it is busy, and turn its errors into a UserError with a fix. No torch."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TypeVar, cast

from cosmos_cli import console
from cosmos_cli.download.assets import Asset
from cosmos_cli.errors import ExitCode, UserError

T = TypeVar("T")

# HTTP statuses of a busy hub, and the seconds to wait before each retry.
BUSY = frozenset({408, 429, 500, 502, 503, 504})
WAITS = (1, 2, 4, 8, 16, 32, 60)
UNREACHABLE = "cannot be reached"


def require_access(asset: Asset) -> None:
    """Check with the hub that this account may read a repository.

    Raises:
        UserError: the account may not, or the hub cannot be reached.
    """
    from huggingface_hub import HfApi, errors

    with user_errors(asset):
        try:
            HfApi().auth_check(asset.repo, repo_type=asset.kind)
        except errors.RepositoryNotFoundError:
            raise
        except errors.HfHubHTTPError as error:
            # A mirror may not support this request, and a busy hub will answer the download itself.
            if error.response.status_code in (401, 403):
                raise


def retrying(asset: Asset, call: Callable[[], T]) -> T:
    """Return the result of a call. While the hub reports that it is busy, wait and retry."""
    from huggingface_hub import errors

    for seconds in WAITS:
        try:
            return call()
        except (errors.HfHubHTTPError, errors.LocalEntryNotFoundError) as error:
            # The library reports a failed metadata request as "not in the cache". Its cause has the
            # response.
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


@contextmanager
def user_errors(asset: Asset) -> Iterator[None]:
    """Turn errors of the hub into a UserError with a fix and the URL of the repository."""
    from huggingface_hub import errors, get_token

    # The base class comes from httpx or httpx2, depending on the version of huggingface_hub.
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
        raise bad(
            "needs a token", "accept the licence there, then `export HF_TOKEN=hf_...`"
        ) from error
    except errors.RepositoryNotFoundError as error:
        raise bad(
            "does not exist, or is private", "check the name, or `export HF_TOKEN=hf_...`"
        ) from error
    except errors.RevisionNotFoundError as error:
        held = f"delete {asset.record} to take the newest"
        fix = "use `--set dataset_revision=main`" if asset.revision else held
        raise bad("has no such revision", fix) from error
    except errors.LocalEntryNotFoundError as error:
        raise unreachable(error) from error
    except errors.EntryNotFoundError as error:
        raise bad(f"has no such file: {error}", "check the revision") from error
    except errors.HFValidationError as error:
        raise bad(
            "is not a valid repository name", "use `--set dataset_repo=OWNER/NAME`"
        ) from error
    except errors.HfHubHTTPError as error:
        raise bad(f"the hub answered: {error}", "try again later") from error
    except (transport_error, errors.OfflineModeIsEnabled, ConnectionError) as error:
        raise unreachable(error) from error
    except OSError as error:
        if error.errno is not None:
            raise
        # huggingface_hub raises an OSError without errno if a file arrives incomplete.
        raise bad("sent only a part of a file", "run the same command again") from error
