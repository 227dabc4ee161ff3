"""``dpft report``"""

import click

from dpft.cli.common import as_json, show


@click.command()
@click.argument("folder", type=click.Path(file_okay=False))
@as_json
def report(folder: str, as_json: bool) -> None:
    """Make a run's privacy card again, with ε derived anew from its recorded events; or the page of a sweep.

    A sweep has a page for publication in its folder, and below private/ one with all that it found.

    \b
    Example:
      dpft report runs/notes
    """
    from dpft.report import write_card
    from dpft.runs import RunFolder

    files = RunFolder(folder)
    sweeps = [place.sweep_file for place in (RunFolder(files.private), files) if place.sweep_file.exists()]
    if files.finished or not sweeps:
        paths = list(write_card(folder))
    else:
        from dpft.report.page import write_page
        from dpft.runs.sweep import Sweep

        paths = write_page(Sweep.read(sweeps[0]), folder)
    if as_json:
        show({"files": [str(path) for path in paths]}, True)
        return
    for path in paths:
        click.echo(path)
