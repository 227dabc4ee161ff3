"""``dpft report``"""

import click


@click.command()
@click.argument("folder", type=click.Path(file_okay=False))
def report(folder: str) -> None:
    """Make a run's privacy card again, with ε derived anew from its recorded events.

    \b
    Example:
      dpft report runs/notes
    """
    from dpft.report import write_card

    for path in write_card(folder):
        click.echo(path)
