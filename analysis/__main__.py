"""Tables, plots and verdicts from result files: `python -m analysis <command>`."""

import argparse
import sys

from analysis import (
    agreement,
    bench,
    claims,
    compare,
    gap,
    margins,
    pack,
    plots,
    rates,
    report,
    simulated,
    tables,
    unpack,
)

# A command is a module: the first line of its text is its help, `add_arguments(parser)` declares what it takes, and
# `run(options)` returns the exit code. A ValueError is bad input: one line, exit code 2.
COMMANDS = {
    "agreement": agreement,
    "bench": bench,
    "claims": claims,
    "compare": compare,
    "gap": gap,
    "lr": rates,
    "margins": margins,
    "pack": pack,
    "plots": plots,
    "report": report,
    "simulated": simulated,
    "tables": tables,
    "unpack": unpack,
}


def main(arguments: list[str] | None = None) -> int:
    """Parse the command line and run the command."""
    parser = argparse.ArgumentParser(prog="python -m analysis", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True, metavar="command")
    for name, module in COMMANDS.items():
        summary = module.__doc__.splitlines()[0]
        command = commands.add_parser(name, help=summary, description=summary)
        module.add_arguments(command)
    options = parser.parse_args(arguments)
    try:
        return COMMANDS[options.command].run(options)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
