"""The ``dpft`` command: parse, call, print. Results go to stdout, progress to stderr."""

import sys
import warnings

import click

from dpft import __version__
from dpft.errors import BudgetError, DPFTError

COMMANDS = {
    "init": "dpft.cli.recipe",
    "params": "dpft.cli.recipe",
    "preflight": "dpft.cli.recipe",
    "plan": "dpft.cli.plan",
    "train": "dpft.cli.train",
    "compare": "dpft.cli.train",
    "report": "dpft.cli.report",
    "ledger": "dpft.cli.ledger",
    "audit": "dpft.cli.audit",
    "demo": "dpft.cli.train",
}


class _Lazy(click.Group):
    """Imports a command's module when it is used: `dpft --help` must not wait for torch."""

    def list_commands(self, ctx):
        return list(COMMANDS)

    def get_command(self, ctx, name):
        if name not in COMMANDS:
            return None
        from importlib import import_module

        return getattr(import_module(COMMANDS[name]), name)

    def invoke(self, ctx):
        warnings.filterwarnings("ignore", category=FutureWarning)  # the libraries' talk among themselves
        try:
            return super().invoke(ctx)
        except DPFTError as error:
            click.echo(f"Error: {error}", err=True)
            ctx.exit(3 if isinstance(error, BudgetError) else 1)
        except KeyboardInterrupt:
            click.echo("Stopped. What was released before stays charged.", err=True)
            sys.exit(130)


@click.group(cls=_Lazy, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.version_option(__version__, prog_name="dpft")
def main() -> None:
    """Fine-tune Hugging Face models under differential privacy.

    \b
    Example:
      dpft plan --epsilon 3 --delta 1e-6 --units 50000 --batch-size 256 --epochs 3
    """
