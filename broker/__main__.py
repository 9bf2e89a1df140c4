"""The program `wsbroker`, which is also `python -m broker`: the command line, and what comes before it is loaded."""

import signal
import sys


def main() -> int:
    """Run the command line of the process, and return the exit status."""
    # Until a command has made its own arrangements, Ctrl-C ends the process as any other: at once and without a word.
    # Python's own way is a traceback from somewhere among the imports. A SIGINT that is ignored stays so.
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, signal.SIG_DFL)

    from broker import cli

    return cli.main()


if __name__ == "__main__":
    sys.exit(main())
