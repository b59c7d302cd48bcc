"""`python -m analysis <command> <folder of runs>`."""

import argparse
import sys
from pathlib import Path

from analysis import margins, methods
from analysis.results import load

COMMANDS = {"margins": margins.report, "methods": methods.report}


def main() -> int:
    """Parse the command line, load the results and hand them to the command."""
    parser = argparse.ArgumentParser(prog="python -m analysis", description=__doc__)
    parser.add_argument("command", choices=COMMANDS)
    parser.add_argument("runs", type=Path, nargs="+", help="folders below which result.json files lie")
    parser.add_argument("--output", type=Path, help="folder for the table and the plot; default: the first of runs")
    options = parser.parse_args()
    try:
        return COMMANDS[options.command](load(options.runs), options.output or options.runs[0])
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
