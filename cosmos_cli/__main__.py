"""Run `cosmos` as `python -m cosmos_cli`."""

import atexit
import gc
import sys

from cosmos_cli.errors import ExitCode


def main() -> None:
    """Run the command, on Linux only: other modules import what other systems lack."""
    if sys.platform != "linux":
        print(
            "error: cosmos runs on Linux; on Windows use WSL2 with Ubuntu, macOS is not supported",
            file=sys.stderr,
        )
        sys.exit(ExitCode.ENVIRONMENT)
    from cosmos_cli import app

    # At its exit Python would look for cycles among all objects of torch, for 0.7 s.
    atexit.register(gc.freeze)
    app.main()


if __name__ == "__main__":
    main()
