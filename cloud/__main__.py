"""`headwater-hub`, the command line; what it does is in `cloud.commands`."""

import signal
import sys
from typing import NoReturn

from federation.commands import HUB, further
from federation.errors import HeadwaterError


def main() -> None:
    """The command line. Exit code 0: done; 2: something the user can mend."""
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, _end_now)
    try:
        # It takes a second to load: Ctrl-C meanwhile shall end it without a word.
        from cloud.commands import app

        for name, verb in further(HUB, sys.argv[1:]):
            app.command(name=name)(verb)
        app()
    except HeadwaterError as error:
        sys.stderr.write(f"headwater-hub: {error}\n")
        sys.exit(2)


def _end_now(number: int, _frame: object) -> NoReturn:
    sys.exit(128 + number)


if __name__ == "__main__":
    main()
