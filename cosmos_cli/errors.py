"""Define the errors that a user can cause or fix, and the exit codes that scripts rely on."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from enum import IntEnum
from functools import partial
from pathlib import Path
from typing import Any


class ExitCode(IntEnum):
    """The exit codes of the process, as listed in the README."""

    OK = 0
    BUG = 1
    USAGE = 2
    ENVIRONMENT = 3
    ASSET = 4
    DATASET = 5
    TRAINING = 6
    GPU_MEMORY = 7
    BLOCKED = 8
    SIGINT = 130
    SIGTERM = 143


# The environment variable with the recipe of this command, as words for the shell. The ranks that
# the command starts inherit it.
TYPED_RECIPE = "COSMOS_TYPED_RECIPE"


def fill_in(text: str) -> str:
    """Replace the word RECIPE in the `commands` of a message, so that they can be pasted."""
    words = os.environ.get(TYPED_RECIPE, "RECIPE")
    return re.sub(
        r"`[^`]+`", lambda command: re.sub(r"\bRECIPE\b", lambda _: words, command[0]), text
    )


class UserError(Exception):
    """A failure that the user can fix: one line with where, what was found and what to do.

    In the commands between backticks, RECIPE stands for the recipe that the user typed.

    Args:
        what: what was found, e.g. "unknown key".
        code: the exit code of the process.
        where: file, line, key or setting, e.g. "recipes/x.yaml:12: learning_rte".
        fix: what to do about it, e.g. "did you mean 'learning_rate'?".
        also: further problems of the same kind, printed on one line each.
    """

    def __init__(
        self,
        what: str,
        *,
        code: ExitCode,
        where: str = "",
        fix: str = "",
        also: tuple[UserError, ...] = (),
    ) -> None:
        super().__init__(what)
        self.what = what
        self.code = code
        self.where = where
        self.fix = fix
        self.also = also
        # True once a rank other than 0 has printed this error.
        self.told = False
        # The files finished before the failure, and further fields for --json.
        self.artifacts: tuple[Path, ...] = ()
        self.figures: dict[str, object] = {}

    def __reduce__(self) -> tuple[Any, ...]:
        return partial(type(self), code=self.code), (self.what,), self.__dict__

    def __str__(self) -> str:
        head = f"{self.where}: " if self.where else ""
        tail = f"; {self.fix}" if self.fix else ""
        line = " ".join(f"{head}{self.what}{tail}".split())
        return "\n".join([fill_in(line), *map(str, self.also)])


def usage_error(where: object, what: str, fix: str = "") -> UserError:
    """Return the error for a mistake in a recipe or on the command line."""
    return UserError(what, code=ExitCode.USAGE, where=str(where), fix=fix)


def environment_error(where: object, what: str, fix: str = "") -> UserError:
    """Return the error for a machine or a setting of its environment that cannot be used."""
    return UserError(what, code=ExitCode.ENVIRONMENT, where=str(where), fix=fix)


def asset_error(where: object, what: str, fix: str = "") -> UserError:
    """Return the error for a missing, damaged or refused file, or for too little disk or memory."""
    return UserError(what, code=ExitCode.ASSET, where=str(where), fix=fix)


def dataset_error(where: object, what: str, fix: str = "") -> UserError:
    """Return the error for a dataset that is rejected or not prepared."""
    return UserError(what, code=ExitCode.DATASET, where=str(where), fix=fix)


def together(errors: Sequence[UserError]) -> UserError:
    """Return one error for several, without repeats: the largest exit code first."""
    different = {str(error): error for error in errors}.values()
    first = max(different, key=lambda error: error.code)
    others = (*first.also, *(error for error in different if error is not first))
    return UserError(first.what, code=first.code, where=first.where, fix=first.fix, also=others)


class Interrupted(BaseException):
    """SIGINT, SIGTERM or SIGHUP arrived.

    Like KeyboardInterrupt, no `except Exception` may swallow it.
    """

    def __init__(self, code: ExitCode) -> None:
        super().__init__(code.name)
        self.code = code
        self.artifacts: tuple[Path, ...] = ()
        self.figures: dict[str, object] = {}
