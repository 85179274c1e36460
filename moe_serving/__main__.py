"""`headwater-moe`, the command line; what it does is in `moe_serving.commands`."""

import signal
import sys
from typing import NoReturn

from federation.commands import MOE, further
from federation.errors import HeadwaterError


def main() -> None:
    """The command line. Exit code 0: done; 2: something the user can mend; 3: see `serve`."""
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, _end_now)
    try:
        # It takes a while to load: Ctrl-C meanwhile shall end it without a word.
        from moe_serving.commands import app

        for name, verb in further(MOE, sys.argv[1:]):
            app.command(name=name)(verb)
        app()
    except HeadwaterError as error:
        sys.stderr.write(f"headwater-moe: {error}\n")
        sys.exit(2)


def _end_now(number: int, _frame: object) -> NoReturn:
    sys.exit(128 + number)


if __name__ == "__main__":
    main()
