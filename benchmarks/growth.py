"""How time and memory of a private step grow, and the floor beneath them: writes docs/growth.md and its plots.

    python benchmarks/growth.py --output benchmarks/results/growth.json [--page docs/growth.md]

GPT-2 with LoRA, plain and private training in a process each, in turn; one length, micro-batch, depth or subset is
changed at a time. The floor is counted: operations of plain training's matrix products
(and bytes that an update must move), at the rate that the machine reaches on one large product (on one large copy) in
the same process.
"""

import argparse
import json
import os
import statistics
import sys
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path

from output import circumstances, deliver, options
from speed import Process, timed
from systems import Work

BASE = Work("gpt2", "lora(rank=8)", tokens=128, examples=4)
SWEEPS = {
    "tokens": [replace(BASE, tokens=t, examples=max(1, 512 // t)) for t in (16, 64, 128, 256, 512, 1024)],
    "examples": [replace(BASE, examples=b) for b in (1, 2, 4, 8, 16)],
    "layers": [replace(BASE, layers=n) for n in (3, 6, 12, 24)],
    "rank": [replace(BASE, subset=f"lora(rank={r})") for r in (1, 8, 64, 256)],
}
AXES = {
    "tokens": ("tokens of an example", "seconds for an example", "tokens"),
    "examples": ("examples in a micro-batch", "seconds for an example", "examples"),
    "layers": ("layers", "seconds for an example", "layers"),
    "rank": ("trained numbers", "seconds for an update", "parameters"),
}
UPDATE_BYTES = 4 * 9  # sum and noise in, gradient out; AdamW reads gradient, weight and two moments and writes three


def measure(work: Work, repeats: int) -> dict:
    """Medians for plain and private training of one work, and its floors."""
    with Process("plain", work) as plain, Process("dpft", work) as private:
        for process in (plain, private):
            process.ask("time")  # warm up
        pairs = [(plain.ask("time"), private.ask("time")) for _ in range(repeats)]
        floor = plain.ask("flops")
        memory = {"plain": plain.ask("peak")["mib"], "dpft": private.ask("peak")["mib"]}
        parameters = plain.ask("parameters")["parameters"]
    row = {**asdict(work), "parameters": parameters, "mib": memory, "flops": floor["flops"]}
    for i, system in enumerate(("plain", "dpft")):
        row[system] = {
            "seconds_per_example": statistics.median(pair[i]["micro_batch"] for pair in pairs) / work.examples,
            "update_seconds": statistics.median(pair[i]["update"] for pair in pairs),
        }
    row["floor"] = {
        "seconds_per_example": floor["flops"] / floor["flops_per_second"] / work.examples,
        "update_seconds": parameters * UPDATE_BYTES / floor["bytes_per_second"],
    }
    return row


def accounting() -> list[dict]:
    """Seconds to compose that many steps, on grids refined as usual."""
    from dpft.privacy import accounting
    from dpft.privacy.events import Event

    def composed(steps: int) -> None:
        accounting.epsilon(Event(steps, 1.0, 0.005).dp_event, 1e-6)

    composed(5)  # imports
    return [{"steps": steps, "seconds": timed(partial(composed, steps))} for steps in (10, 100, 1_000, 10_000, 100_000)]


def sampling() -> list[dict]:
    """Seconds of one Poisson draw over that many units."""
    from dpft.privacy.noise import SecureRandomness
    from dpft.privacy.sampling import PoissonSampler

    sampler = PoissonSampler(0.001, 1, SecureRandomness())
    draw = lambda n: min(timed(lambda: sampler.units(n)) for _ in range(3))
    return [{"units": n, "seconds": draw(n)} for n in (10**4, 10**5, 10**6, 10**7)]


def write_page(found: dict, page: Path) -> None:
    from dpft.report import plots

    folder = page.with_suffix("")
    folder.mkdir(exist_ok=True)

    def keep(name: str, svg: str) -> None:
        (folder / f"{name}.svg").write_text(
            svg.replace("<svg ", '<svg xmlns="http://www.w3.org/2000/svg" ', 1) if "xmlns=" not in svg else svg
        )

    for sweep, (x_label, y_label, key) in AXES.items():
        rows = found["sweeps"][sweep]
        x = [row[key] for row in rows]
        figure = "update_seconds" if sweep == "rank" else "seconds_per_example"
        curves = {name: (x, [row[name][figure] for row in rows]) for name in ("dpft", "plain", "floor")}
        keep(sweep, plots.lines(curves, plots.Labels(f"Time and {x_label}", x_label, y_label), log="xy"))
        curves = {name: (x, [row["mib"][name] / 1024 for row in rows]) for name in ("dpft", "plain")}
        title = f"Memory and {x_label}"
        keep(f"{sweep}-memory", plots.lines(curves, plots.Labels(title, x_label, "GiB at the peak"), log="x"))
    for name, key, title in (("steps", "steps", "Composing ε"), ("units", "units", "One Poisson draw")):
        x, y = zip(*((row[key], row["seconds"]) for row in found[name]), strict=True)
        keep(name, plots.lines({"dpft": (x, y)}, plots.Labels(title, key, "seconds"), log="xy"))
    page.write_text(text(found, folder.name))


def text(found: dict, folder: str) -> str:
    """The page: plots, the figures behind them, and what is left."""
    out = [
        "# How cost grows",
        "",
        "Generated by `python benchmarks/growth.py --output benchmarks/results/growth.json --page docs/growth.md`, on "
        f"{found['hardware']}, torch {found['versions']['torch']}. GPT-2 small with LoRA of rank 8, micro-batches of "
        "4 times 128 tokens unless said otherwise; plain and private training in turn. The dashed floor is counted: "
        f"the operations of plain training's matrix products at the rate of one large product on the same machine, or "
        "the bytes that an update must move.",
    ]
    for sweep, (x_label, _, key) in AXES.items():
        out += [
            "",
            f"## {x_label[0].upper()}{x_label[1:]}",
            "",
            f"![time]({folder}/{sweep}.svg) ![memory]({folder}/{sweep}-memory.svg)",
            "",
        ]
        out += [
            f"| {x_label} | dpft / plain, micro-batch | dpft / plain, update | plain / floor | memory, dpft / plain |",
            "| --- | --- | --- | --- | --- |",
        ]
        for row in found["sweeps"][sweep]:
            ratio = lambda figure, a="dpft", b="plain", row=row: row[a][figure] / row[b][figure]
            out.append(
                f"| {row[key]:,} | {ratio('seconds_per_example'):.2f} | {ratio('update_seconds'):.2f} | "
                f"{ratio('seconds_per_example', 'plain', 'floor'):.2f} | "
                f"{row['mib']['dpft'] / row['mib']['plain']:.2f} |"
            )
    out += ["", "## Steps and units", "", f"![steps]({folder}/steps.svg) ![units]({folder}/units.svg)", ""]
    longest, widest = found["steps"][-1], found["units"][-1]
    out += [
        f"Composing {longest['steps']:,} steps takes {longest['seconds']:.2f} s; what decides is how fine a grid ε "
        f"needs, not how many steps there are. A draw over {widest['units']:,} units takes {widest['seconds']:.2f} s "
        "and grows with their number.",
        "",
        "## What is left, and why",
        "",
        "- **Between plain training and the floor**: softmax, normalisation and activations, which count no "
        "operations here, and products too small to reach the rate of a large one. Private training inherits this "
        "distance and adds little to it.",
        "- **Between private and plain training**: norms and clipped sums read every per-example gradient once more. "
        "For LoRA these are small beside the activations; they grow with examples times trained numbers.",
        "- **Below plain training**: logits. Plain training keeps those of all tokens and a gradient as large; dpft "
        "makes a few hundred tokens' at a time, and at once the gradient of what went into the head. It needs no "
        "privacy, and shows the more the smaller the model before the head.",
        "- **In the update**: noise. It is drawn from a cryptographic generator, four Gaussians for each number, and "
        "takes several times what AdamW does. It is paid once in a step, whatever the number of examples: "
        "share it out over an effective batch of hundreds of examples.",
        "- **In memory**: the libraries that dpft loads (SciPy, dp-accounting, cryptography: a constant of 40 MB), "
        "one row of trained numbers for each example of a micro-batch and, where the norm of a large weight is taken "
        "alone, the gradients of its layer's outputs until all norms are known. What the C library's allocator keeps "
        "of freed memory varies by as much from process to process.",
        "",
    ]
    return "\n".join(out)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--page", type=Path, help="also write the page, with its plots in a folder beside it")
    parser.add_argument("--from", dest="known", type=Path, help="read the figures from this JSON instead of measuring")
    options(parser)
    arguments = parser.parse_args()
    os.environ.setdefault("DPFT_MODELS", "")
    if arguments.known:
        found = json.loads(arguments.known.read_text())
    else:
        found = {
            "sweeps": {},
            "steps": accounting(),
            "units": sampling(),
            "repeats": arguments.repeats,
            **circumstances(),
        }
        for sweep, works in SWEEPS.items():
            found["sweeps"][sweep] = []
            for work in works:
                found["sweeps"][sweep].append(measure(work, arguments.repeats))
                print(sweep, json.dumps(found["sweeps"][sweep][-1]), file=sys.stderr, flush=True)
    if arguments.page:
        write_page(found, arguments.page)
    deliver(found, arguments)


if __name__ == "__main__":
    main()
