"""Look at the expert load of a run: `ssr-monitor report RUN` writes a page, `ssr-monitor serve RUN` shows it live."""

from __future__ import annotations

import argparse
import sys

from ssr_deepspeed.monitor import report, serve, watch

_COMMANDS = {
    "report": (report, "write a self-contained HTML page"),
    "serve": (serve, "show the page in a browser while the run goes on"),
    "watch": (watch, "show runs in this terminal while they go on"),
}


def main(arguments: list[str] | None = None) -> int:
    """Entry point of the command `ssr-monitor`; its exit status."""
    parser = argparse.ArgumentParser("ssr-monitor", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, (module, purpose) in _COMMANDS.items():
        module.add_arguments(commands.add_parser(name, help=purpose, description=module.__doc__))
    options = parser.parse_args(arguments)
    try:
        return _COMMANDS[options.command][0].main(options)
    except (ValueError, OSError) as error:
        print(f"ssr-monitor: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
