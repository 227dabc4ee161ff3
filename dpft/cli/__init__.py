"""The ``dpft`` command: parse, call, print. Results go to stdout, progress to stderr."""

import sys
from typing import Any, NoReturn

import click

from dpft import __version__
from dpft.cli.failures import explained, pipe_is_closed
from dpft.cli.libraries import only_our_messages
from dpft.cli.streams import spell_out

COMMANDS = {
    "init": "dpft.cli.recipe",
    "params": "dpft.cli.recipe",
    "preflight": "dpft.cli.recipe",
    "plan": "dpft.cli.plan",
    "train": "dpft.cli.train",
    "compare": "dpft.cli.sweep",
    "sweep": "dpft.cli.sweep",
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

    def main(self, *args, **kwargs) -> Any:
        spell_out()
        with only_our_messages():
            try:
                return super().main(*args, **kwargs)
            except Exception as error:
                _end(error)

    def invoke(self, ctx):
        try:
            return super().invoke(ctx)
        except KeyboardInterrupt as error:  # click itself would exit with 1
            _end(error)


def _end(error: BaseException) -> NoReturn:
    """Exit with one sentence, and silently where the reader of the output left; a bug is raised again."""
    if pipe_is_closed(error):
        sys.exit(1)
    found = explained(error)
    if found is None:
        raise error
    click.echo(found[0], err=True)
    sys.exit(found[1])


@click.group(cls=_Lazy, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.version_option(__version__, prog_name="dpft")
def main() -> None:
    """Fine-tune Hugging Face models under differential privacy.

    \b
    Example:
      dpft plan --epsilon 3 --delta 1e-6 --units 50000 --batch-size 256 --epochs 3
    """
