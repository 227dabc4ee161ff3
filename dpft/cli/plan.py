"""``dpft plan``"""

import click

from dpft.cli.common import as_json, printed, show


@click.command()
@click.option("--epsilon", type=float, help="Target ε; the noise (or the steps) follow.")
@click.option("--noise-multiplier", type=float, help="Noise in units of the clip; ε (or the steps) follow.")
@click.option("--delta", type=float, required=True, help="δ, below 1/units.")
@click.option("--units", type=int, help="Declared, public number of units.")
@click.option("--batch-size", type=int, help="Expected units per step; needs --units.")
@click.option("--sample-rate", type=float, help="Instead of --batch-size: each unit's probability per step.")
@click.option("--steps", type=int, help="Number of steps.")
@click.option("--epochs", type=float, help="Instead of --steps: expected passes over the data.")
@click.option("--adjacency", default="add-or-remove-one", show_default=True, help="Or replace-one, zero-out.")
@click.option("--unit", default="example", show_default=True, help="What one unit is: example, or a column's name.")
@as_json
def plan(as_json: bool, **facts) -> None:
    """Find ε, the noise or the number of steps: give two of the three.

    \b
    Example:
      dpft plan --noise-multiplier 1.0 --sample-rate 0.02 --steps 500 --delta 1e-5
    """
    from dpft.privacy.plan import Plan

    made = Plan.calibrate(**facts)
    figure = (lambda value: value) if as_json else printed
    show(
        {
            "epsilon": figure(made.epsilon),
            "epsilon_rdp": figure(made.epsilon_rdp),
            "delta": made.delta,
            "noise_multiplier": made.noise_multiplier,
            "sample_rate": made.sample_rate,
            "steps": made.steps,
            "units": made.units,
            "expected_batch_size": made.expected_batch_size if made.units else None,
            "adjacency": made.adjacency,
            "unit": made.unit,
            "sampler": "Poisson",
            "mechanism": "Gaussian",
        },
        as_json,
    )
