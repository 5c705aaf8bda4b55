"""The command line: `spectral-ds COMMAND`, one file or folder a command.

Each command's module has `add_parser(commands)`, which says what it takes and sets `run`, the
function of the parsed arguments that does it. What takes long to import is imported there.
"""

import argparse
import sys
from collections.abc import Sequence
from importlib.metadata import version
from typing import Any, NoReturn

from spectral_ds.cli.add import add_parser as add_add
from spectral_ds.cli.check import add_parser as add_check
from spectral_ds.cli.compare import add_parser as add_compare
from spectral_ds.cli.env import add_parser as add_env
from spectral_ds.cli.errors import UserError
from spectral_ds.cli.inspect import add_parser as add_inspect
from spectral_ds.cli.merge import add_parser as add_merge
from spectral_ds.cli.plan import add_parser as add_plan
from spectral_ds.config import SpectralConfigError

COMMANDS = (add_inspect, add_plan, add_merge, add_compare, add_add, add_check, add_env)
EXAMPLES = """examples:
  spectral-ds env                                    what works here, and how to get the rest
  spectral-ds inspect ./model                        graph and spectrum of a model's parameters
  spectral-ds inspect ./model --data reviews.tsv     which graph separates signal from noise
  spectral-ds plan --model llama-3-8b --engine zero3 --world-size 64    what each rank would take
  spectral-ds merge ./base ./tuned --out ./merged    a tuned model that forgets less
  spectral-ds compare --config mine.yaml --out runs/mine   does it help? methods side by side
  spectral-ds add ds_config.json --preset retain     a DeepSpeed config with the section added
  spectral-ds check --nodes 2 --node-rank 0 ...      do all nodes have the same packages and config
"""
# Exit status for wrong input, as argparse has it.
WRONG_INPUT = 2


class _Parser(argparse.ArgumentParser):
    """Reports wrong arguments in one line."""

    def error(self, message: str) -> NoReturn:
        self.exit(WRONG_INPUT, f"{self.prog}: {message} (see {self.prog} --help)\n")


def make_parser() -> argparse.ArgumentParser:
    """The parser of all commands."""
    parser = _Parser(
        prog="spectral-ds",
        description="Spectral graph filtering of sharded gradients: looks at models and machines.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--version", action="version", version=f"spectral-ds {version('spectral-ds')}"
    )
    commands: Any = parser.add_subparsers(metavar="COMMAND", required=True, title="commands")
    for add in COMMANDS:
        add(commands)
    return parser


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """The arguments. `KEY=VALUE` may stand anywhere, where argparse alone takes it in one place."""
    parser = make_parser()
    arguments, rest = parser.parse_known_args(argv)
    later = [word for word in rest if "=" in word and not word.startswith("-")]
    if len(later) < len(rest) or (later and "overrides" not in arguments):
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    if later:
        arguments.overrides += later
    return arguments


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command.

    Args:
        argv: its words; by default those of the process.

    Returns:
        The exit status: 2 for wrong input, and for files that cannot be read or written, which is
        reported in one line on stderr.
    """
    try:
        arguments = parse(argv)
    except SystemExit as stop:  # after --help, --version and wrong arguments
        return int(stop.code or 0)
    try:
        status: int = arguments.run(arguments)
    except (UserError, SpectralConfigError) as error:
        return _refused(str(error))
    except OSError as error:
        where = "" if error.filename is None else f"{error.filename}: "
        return _refused(f"{where}{error.strerror or error}")
    return status


def _refused(reason: str) -> int:
    print(f"spectral-ds: {'; '.join(reason.splitlines())}", file=sys.stderr)
    return WRONG_INPUT
