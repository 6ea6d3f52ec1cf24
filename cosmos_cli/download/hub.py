"""Ask the hub: wait while it is busy, and turn its errors into a UserError with a fix. No torch."""

from __future__ import annotations

import importlib.util
import os
import re
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TypeVar, cast
from urllib.parse import urlsplit

from cosmos_cli import console
from cosmos_cli.download.assets import HOME, Asset
from cosmos_cli.errors import UserError, asset_error, environment_error

T = TypeVar("T")

# HTTP statuses of a busy hub, and the seconds to wait before each retry.
BUSY = frozenset({408, 429, 500, 502, 503, 504})
WAITS = (1, 2, 4, 8, 16, 32, 60)
UNREACHABLE = "cannot be reached"
PROXY_SCHEMES = ("http", "https", "socks5", "socks5h")


# --- the environment ------------------------------------------------------------------------------


def check_endpoint() -> None:
    """Check HF_ENDPOINT, which huggingface_hub and transformers read when they are imported.

    Raises:
        UserError: it is not a URL.
    """
    found = os.environ.get("HF_ENDPOINT")
    if found is not None and not _is_url(found, ("http", "https")):
        what = f"must be a URL such as https://huggingface.co, found {found!r}"
        raise environment_error("HF_ENDPOINT", what, "correct it, or run `unset HF_ENDPOINT`")


def _check_token() -> None:
    """Check that the token fits into an HTTP header. The error does not show the token."""
    from huggingface_hub import constants, get_token

    for letter in get_token() or "":
        if not "!" <= letter <= "~" or letter in "\"'":
            names = [n for n in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN") if os.environ.get(n)]
            what = f"holds {letter!a}, which no token has"
            fix = "copy the token again: `export HF_TOKEN=hf_...`"
            raise environment_error([*names, constants.HF_TOKEN_PATH][0], what, fix)


def _proxies() -> dict[str, tuple[str, str]]:
    """Return the variable and the value of each proxy, by "http", "https" and "all".

    Raises:
        UserError: a value is not the URL of a proxy, or its kind is not supported.
    """
    # Importing it takes 24 ms, and every command imports this module.
    from urllib.request import getproxies

    given = getproxies()
    if "*" in given.get("no", "").split(","):
        return {}
    found = {}
    for scheme in ("http", "https", "all"):
        if url := given.get(scheme):
            lower = f"{scheme}_proxy"
            name = lower if os.environ.get(lower) else lower.upper()
            if not _is_url(url if "://" in url else f"http://{url}", PROXY_SCHEMES):
                what = f"must be a URL of {', '.join(PROXY_SCHEMES)}, found {_masked(url)!r}"
                raise environment_error(name, what, f"correct it, or run `unset {name}`")
            if url.startswith("socks") and importlib.util.find_spec("socksio") is None:
                what = "a SOCKS proxy needs the package socksio, which is not installed"
                raise environment_error(name, what, "run `pip install socksio`")
            found[scheme] = name, url
    return found


def _proxy_of(address: str) -> tuple[str, str] | None:
    """Return the variable and the value of the proxy that an address is asked through, if any."""
    from urllib.request import proxy_bypass

    parts = urlsplit(address)
    if proxy_bypass(parts.netloc):
        return None
    found = _proxies()
    return found.get(parts.scheme) or found.get("all")


def _is_url(text: str, schemes: tuple[str, ...]) -> bool:
    try:
        parts = urlsplit(text)
        valid = parts.scheme in schemes and bool(parts.hostname) and parts.port != 0
    except ValueError:
        return False
    # urlsplit ignores line breaks.
    return valid and re.fullmatch("[!-~]+", text) is not None


def _masked(url: str) -> str:
    """Return a URL without its user name and password."""
    return re.sub(r"[^/]*@", "***@", url)


# --- requests -------------------------------------------------------------------------------------


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
    """Turn errors of the hub into a UserError with a fix and the URL of the repository.

    Raises:
        UserError: a request failed, or the environment has a wrong token or proxy.
    """
    from huggingface_hub import constants, errors, get_token

    # The base class comes from httpx or httpx2, depending on the version of huggingface_hub.
    transport_error = cast(type[Exception], errors.HfHubHTTPError.__bases__[0])

    # A mirror may be asked, but licences are accepted on huggingface.co.
    asked = asset.url.replace(HOME, constants.ENDPOINT, 1)

    _check_token()
    _proxies()
    try:
        yield
    except errors.GatedRepoError as error:
        page = asset.url
        if get_token():
            fix = "accept the licence on that page"
            raise asset_error(page, "your account has no access", fix) from error
        fix = "accept the licence there, then `export HF_TOKEN=hf_...`"
        raise asset_error(page, "needs a token", fix) from error
    except errors.RepositoryNotFoundError as error:
        fix = "check the name, or `export HF_TOKEN=hf_...`"
        raise asset_error(asked, "does not exist, or is private", fix) from error
    except errors.RevisionNotFoundError as error:
        held = f"delete {asset.record} to take the newest"
        fix = "use `--set dataset_revision=main`" if asset.revision else held
        raise asset_error(asked, "has no such revision", fix) from error
    except errors.LocalEntryNotFoundError as error:
        raise _unreachable(error, asked) from error
    except errors.EntryNotFoundError as error:
        raise asset_error(asked, f"has no such file: {error}", "check the revision") from error
    except errors.HFValidationError as error:
        names = asset.kind == "dataset"
        fix = "use `--set dataset_repo=OWNER/NAME`" if names else "use OWNER/NAME, a folder or off"
        raise asset_error(asked, "is not a valid repository name", fix) from error
    except errors.HfHubHTTPError as error:
        raise asset_error(asked, f"the hub answered: {error}", "try again later") from error
    except (transport_error, errors.OfflineModeIsEnabled, ConnectionError) as error:
        raise _unreachable(error, asked) from error
    except OSError as error:
        if error.errno is not None:
            raise
        # huggingface_hub raises an OSError without errno if a file arrives incomplete.
        raise asset_error(
            asked, "sent only a part of a file", "run the same command again"
        ) from error


def _unreachable(error: Exception, asked: str) -> UserError:
    """Return the error of a hub that does not answer at the URL `asked`, with the likely reason."""
    from huggingface_hub import errors

    cause = error.__cause__ if isinstance(error, errors.LocalEntryNotFoundError) else error
    what = f"{UNREACHABLE}: {str(cause or error) or type(error).__name__}"
    fix = (
        "check the network" if asked.startswith(f"{HOME}/") else "check the network and HF_ENDPOINT"
    )
    if isinstance(error, errors.OfflineModeIsEnabled):
        what, fix = f"{UNREACHABLE}: HF_HUB_OFFLINE is set", "run `unset HF_HUB_OFFLINE`"
    elif proxy := _proxy_of(asked):
        through = f"{UNREACHABLE} through the proxy {_masked(proxy[1])} ({proxy[0]})"
        what = what.replace(UNREACHABLE, through, 1)
        fix = f"check the proxy, or run `unset {proxy[0]}`"
    return asset_error(asked, what, fix)
