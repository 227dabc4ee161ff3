"""For which PEFT tuners and layers a library's per-example gradients are those of one example at a time.

    python benchmarks/coverage.py --json coverage.json [--tuner NAME] [--family NAME] [--layer NAME]
        [--markdown docs/coverage.md]

Systems: dpft, and Opacus with its hooks, with functorch for every layer, and with ghost clipping (norms only).

exact     every parameter's gradient of every example equals the brute-force one to 1e-4
wrong     gradients came out, and they do not
refused   the library says by itself that it cannot
raises    some other exception, which may be from anywhere
"""

import argparse
import json
import logging
import math
import signal
import sys
import warnings
from collections.abc import Callable, Sequence
from contextlib import contextmanager
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

import opacus
import peft
import torch
import transformers
from opacus.grad_sample import GradSampleModule
from opacus.grad_sample.grad_sample_module_fast_gradient_clipping import GradSampleModuleFastGradientClipping
from opacus.validators import ModuleValidator
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

import dpft
from dpft.errors import DPFTError
from dpft.gradients.engine import Engine
from dpft.gradients.preflight import preflight
from dpft.privacy.plan import Plan
from tests.support.zoo import LAYERS, REFUSED, TUNED, TUNERS, Case

TOLERANCE = 1e-4
FLOOR = 1e-2  # a parameter's error is measured against at least this share of the whole gradient's norm
SECONDS = 60  # for one case in one system

Made = tuple[nn.Module, Callable[[Sequence], Tensor], list]
Rows = list[dict[str, Tensor]]  # for each example, each parameter's gradient


class Refused(Exception):
    """A peer said that it cannot."""


class NoGradient(Exception):
    """Opacus left a parameter without per-example gradients: its optimizer would not step."""


# -- the truth ---------------------------------------------------------------------------------------------------------


class Steady(TorchFunctionMode):
    """Random numbers that are the same for every example, position and call, so that gradients can be compared."""

    SHAPED = {torch.rand, torch.randn, torch.normal}
    LIKE = {torch.rand_like, torch.randn_like}
    DRAWN = {torch._standard_gamma, torch.bernoulli, torch.poisson}

    def __torch_function__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        if function not in self.SHAPED | self.LIKE | self.DRAWN or not result.dim():
            return result
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            return torch.rand(result.shape[-1:], dtype=result.dtype).expand(result.shape).clone()


def ready(model: nn.Module) -> None:
    """Train mode, no dropout, and trainable parameters slightly moved: a fresh LoRA's zeros would prove nothing."""
    model.train()
    for module in model.modules():
        if isinstance(module, nn.modules.dropout._DropoutNd):
            module.p = 0.0
        if hasattr(module, "sampler"):
            module.sampler.index = 1  # MonteCLoRA's buffer of one draw is spent, so that the next is Steady's
        for name, value in list(vars(module).items()):
            if "dropout" in name and isinstance(value, float):
                setattr(module, name, 0.0)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in trainable(model).values():
            parameter += 0.01 * torch.randn(parameter.shape, generator=generator)


def trainable(model: nn.Module) -> dict[str, nn.Parameter]:
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def brute_force(make: Callable[[], Made]) -> Rows:
    """One example at a time, by plain autograd.

    Raises:
        ValueError: nothing is trainable, or no parameter gets a gradient.
    """
    model, losses, examples = make()
    ready(model)
    parameters = trainable(model)
    if not parameters:
        raise ValueError("no parameter is trainable")
    rows = []
    with Steady():
        for example in examples:
            loss = losses([example])[0]
            gradients = torch.autograd.grad(loss, list(parameters.values()), allow_unused=True)
            rows.append(
                {
                    name: torch.zeros_like(parameter) if gradient is None else gradient
                    for (name, parameter), gradient in zip(parameters.items(), gradients, strict=True)
                }
            )
    if not any(gradient.any() for row in rows for gradient in row.values()):
        raise ValueError("no parameter gets a gradient")
    return rows


def relative_error(rows: Rows, reference: Rows) -> tuple[float, str]:
    """The largest over examples and parameters of ‖g − ref‖ / max(‖ref‖, 0.01 ‖whole ref‖), and that parameter's
    name."""
    worst, where = 0.0, ""
    for row, expected in zip(rows, reference, strict=True):
        floor = FLOOR * norm(expected)
        for name, gradient in expected.items():
            error = float((row[name].float() - gradient).norm() / max(float(gradient.norm()), floor, 1e-30))
            if not error <= worst:  # NaN is an error
                worst, where = error, name
    return worst, where


def norm(row: dict[str, Tensor]) -> float:
    return float(torch.stack([gradient.norm() for gradient in row.values()]).norm())


# -- the systems -------------------------------------------------------------------------------------------------------


def of_dpft(make: Callable[[], Made], reference: Rows) -> tuple[float, str]:
    model, losses, examples = make()
    ready(model)
    plan = Plan(noise_multiplier=1.0, sample_rate=0.5, steps=10, delta=1e-3, units=8)
    with Engine(model, plan) as engine:
        found = preflight(engine, losses, examples)
        batches = [examples] if engine.max_examples(9) >= len(examples) else [[example] for example in examples]
        rows = []
        with Steady():
            for batch in batches:
                for row in engine.capture.rows(losses(batch)):
                    rows.append({p.name: p.view(row).clone() for p in engine.capture.map.trainables})
    error, where = relative_error(rows, reference)
    return error, where if error > TOLERANCE else ", ".join(found.techniques)


def of_opacus(make: Callable[[], Made], reference: Rows, **settings) -> tuple[float, str]:
    model, losses, examples = make()
    ready(model)
    _validate(model)
    _wrap(GradSampleModule, model, **settings)
    with Steady():
        losses(examples).sum().backward()
    rows: Rows = [{} for _ in examples]
    for name, parameter in trainable(model).items():
        sample = parameter.grad_sample
        if sample is None:
            if parameter.grad is not None:
                raise NoGradient(f"no per-sample gradient for {name}")
            sample = torch.zeros(len(examples), *parameter.shape)
        sample = torch.cat(sample) if isinstance(sample, list) else sample
        if sample.shape != (len(examples), *parameter.shape):
            return float("inf"), f"{name}: {len(sample)} gradients for {len(examples)} examples"
        for row, gradient in zip(rows, sample, strict=True):
            row[name] = gradient
    return relative_error(rows, reference)


def of_ghost(make: Callable[[], Made], reference: Rows) -> tuple[float, str]:
    """Ghost clipping never makes the gradients, so their norms are compared."""
    model, losses, examples = make()
    ready(model)
    _validate(model)
    wrapped = _wrap(GradSampleModuleFastGradientClipping, model, max_grad_norm=1.0, use_ghost_clipping=True)
    with Steady():
        losses(examples).sum().backward()
    for name, parameter in trainable(model).items():
        if not hasattr(parameter, "_norm_sample"):
            raise NoGradient(f"no per-sample norm for {name}")
    norms = wrapped.get_norm_sample()
    if len(norms) != len(examples):
        return float("inf"), f"{len(norms)} norms for {len(examples)} examples"
    expected = torch.tensor([norm(row) for row in reference])
    return float(((norms - expected).abs() / expected.clamp_min(1e-30)).max()), "norm"


def _validate(model: nn.Module) -> None:
    errors = ModuleValidator.validate(model)
    if errors:
        raise Refused(str(errors[0]))


def _wrap(wrapper: type, model: nn.Module, **settings) -> nn.Module:
    """As its PrivacyEngine does, with the summed loss; strict, so that trainable layers with buffers are refused."""
    try:
        return wrapper(model, loss_reduction="sum", **settings)
    except NotImplementedError as error:
        raise Refused(str(error)) from error


SYSTEMS: dict[str, Callable[[Callable[[], Made], Rows], tuple[float, str]]] = {
    "dpft": of_dpft,
    "opacus hooks": of_opacus,
    "opacus functorch": lambda make, reference: of_opacus(make, reference, force_functorch=True),
    "opacus ghost": of_ghost,
}


def outcome(system: str, make: Callable[[], Made], reference: Rows) -> dict:
    """``status``, ``max_relative_error`` (None if the gradients are none, too few or not finite) and ``reason`` of one
    case in one system."""
    try:
        with limited(SECONDS):
            error, reason = SYSTEMS[system](make, reference)
        status = "exact" if error < TOLERANCE else "wrong"
        return {"status": status, "max_relative_error": error if math.isfinite(error) else None, "reason": reason}
    except (DPFTError, Refused) as error:
        return {"status": "refused", "max_relative_error": None, "reason": sentence(error)}
    except Exception as error:  # noqa: BLE001
        return {"status": "raises", "max_relative_error": None, "reason": f"{type(error).__name__}: {sentence(error)}"}


def sentence(error: Exception) -> str:
    text = " ".join(str(error).split())
    return text.split(". ")[0][:300]


@contextmanager
def limited(seconds: int):
    def expired(*_):
        raise TimeoutError(f"not done in {seconds} s")

    before = signal.signal(signal.SIGALRM, expired)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


# -- rows --------------------------------------------------------------------------------------------------------------


def tuned(family: str, tuner: str) -> Made:
    case = Case(family, tuner)
    return case.model, case.losses, case.examples


def tuner_rows(tuner: str, family: str) -> list[dict]:
    """One row for each system, or one that says why PEFT itself cannot train this family so."""
    key = {"tuner": tuner, "peft_type": TUNERS[tuner].peft_type, "family": family}
    make = lambda: tuned(family, tuner)
    try:
        with limited(SECONDS):
            reference = brute_force(make)
    except Exception as error:  # noqa: BLE001
        reason = f"{type(error).__name__}: {sentence(error)}"
        return [{**key, "system": "peft", "status": "unsupported", "max_relative_error": None, "reason": reason}]
    return [{**key, "system": system, **outcome(system, make, reference)} for system in SYSTEMS]


def layer_rows(layer: str) -> list[dict]:
    reference = brute_force(LAYERS[layer])
    return [{"layer": layer, "system": system, **outcome(system, LAYERS[layer], reference)} for system in SYSTEMS]


def collect(tuner: str | None, family: str | None, layer: str | None) -> list[dict]:
    rows = []
    for name in TUNERS if not layer else []:
        for where in TUNED:
            if tuner in (None, name) and family in (None, where):
                if TUNERS[name].layers is None or where in TUNERS[name].layers:
                    rows += shown(tuner_rows(name, where))
    for name in LAYERS if not tuner and not family else []:
        if layer in (None, name):
            rows += shown(layer_rows(name))
    return rows


def shown(rows: list[dict]) -> list[dict]:
    first = rows[0]
    name = first.get("layer") or f"{first['tuner']:28} {first['family']}"
    cells = [r["status"] if r["status"] != "unsupported" else f"PEFT: {r['reason'][:80]}" for r in rows]
    print(f"{name:48}" + "".join(f"{cell:18}" for cell in cells), flush=True)
    return rows


# -- reports -----------------------------------------------------------------------------------------------------------


def whole(rows: list[dict], system: str) -> list[str]:
    """The PEFT types of which every variant is exact on every family that PEFT supports."""
    found: dict[str, bool] = {}
    for row in rows:
        if row.get("system") == system and "peft_type" in row:
            found[row["peft_type"]] = found.get(row["peft_type"], True) and row["status"] == "exact"
    return [name for name, exact in found.items() if exact]


def summary(rows: list[dict]) -> str:
    types = len({row["peft_type"] for row in rows if "peft_type" in row and row["system"] != "peft"})
    lines = []
    for system in SYSTEMS:
        counts = {}
        for row in rows:
            if row["system"] == system:
                counts[row["status"]] = counts.get(row["status"], 0) + 1
        text = ", ".join(f"{counts[s]} {s}" for s in ("exact", "wrong", "refused", "raises") if s in counts)
        lines.append(f"{system:18} {len(whole(rows, system)):2} of {types} PEFT types exact everywhere; cases: {text}")
    return "\n".join(lines)


INTRODUCTION = """# Coverage

Made by `python benchmarks/coverage.py --markdown docs/coverage.md` with {versions}; do not edit.

Every tuner of PEFT is put on small random models of {families} families, and layers are trained in place. The truth is
a loop of plain backward passes, one example at a time. A case is **exact** (E) if every parameter's gradient of every
example agrees with it to 1e-4, **wrong** (W) if gradients came out that do not, **refused** (R) if the library says
that it cannot, and X if another exception is raised. Of ghost clipping, which makes no gradients, the norms are compared.

```
{summary}
```
"""


def markdown(rows: list[dict]) -> str:
    letters = {"exact": "E", "wrong": "W", "refused": "R", "raises": "X"}
    table: dict[tuple[str, str], str] = {}
    for row in rows:
        if row["system"] != "peft":
            letter = letters[row["status"]]
            key = (row["tuner"], row["family"]) if "tuner" in row else (row["layer"], "")
            table[key] = f"{table[key]} {letter}" if key in table else f"**{letter}**"
    packages = {"dpft": dpft, "peft": peft, "opacus": opacus, "torch": torch, "transformers": transformers}
    versions = ", ".join(f"{name} {getattr(package, '__version__', '')}".strip() for name, package in packages.items())
    lines = [INTRODUCTION.format(versions=versions, families=len(TUNED), summary=summary(rows))]
    how: dict[str, str] = {row["tuner"]: "" for row in rows if "tuner" in row}
    for tuner in how:
        used = {
            row["reason"]
            for row in rows
            if row.get("tuner") == tuner and row["system"] == "dpft" and row["status"] == "exact"
        }
        how[tuner] = ", ".join(sorted({technique for names in used for technique in names.split(", ")}))
    lines += ["## Tuners", "", f"Each cell: {', '.join(SYSTEMS)}. Empty: PEFT does not support it, see below.", ""]
    lines += ["| tuner | " + " | ".join(TUNED) + " | dpft's techniques |", "|---|" + "---|" * (len(TUNED) + 1)]
    for tuner in dict.fromkeys(row["tuner"] for row in rows if "tuner" in row):
        lines.append(
            f"| {tuner} | " + " | ".join(table.get((tuner, family), "") for family in TUNED) + f" | {how[tuner]} |"
        )
    lines += [
        "",
        "## Layers trained in place",
        "",
        "| layer | " + " | ".join(SYSTEMS) + " |",
        "|---|" + "---|" * len(SYSTEMS),
    ]
    for layer in dict.fromkeys(row["layer"] for row in rows if "layer" in row):
        statuses = {row["system"]: row["status"] for row in rows if row.get("layer") == layer}
        lines.append(f"| {layer} | " + " | ".join(statuses[system] for system in SYSTEMS) + " |")
    lines += ["", "## What dpft refuses", ""]
    for name, families in where(rows, "dpft", ("refused", "raises", "wrong")).items():
        lines.append(f"- {name}{families}: {REFUSED.get(name, 'not explained')}.")
    lines += [
        "",
        "## What PEFT does not support",
        "",
        "These raise in PEFT itself, before any library for privacy is asked.",
        "",
    ]
    lines += [f"- {name}{families}" for name, families in where(rows, "peft", ("unsupported",)).items()]
    return "\n".join(lines) + "\n"


def where(rows: list[dict], system: str, statuses: Sequence[str]) -> dict[str, str]:
    """Tuners and layers with one of these statuses, and the families concerned, as text."""
    found: dict[str, list[str]] = {}
    for row in rows:
        if row["system"] == system and row["status"] in statuses:
            found.setdefault(row.get("layer") or row["tuner"], []).append(row.get("family", ""))
    return {name: f" ({', '.join(families)})" if any(families) else "" for name, families in found.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="write every row here")
    parser.add_argument("--tuner", choices=list(TUNERS), metavar="NAME")
    parser.add_argument("--family", choices=TUNED)
    parser.add_argument("--layer", choices=list(LAYERS), metavar="NAME")
    parser.add_argument("--markdown", type=Path, help="write the report here")
    parser.add_argument("--rows", type=Path, help="do not run: report on what --json wrote")
    arguments = parser.parse_args()
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    torch.set_num_threads(1)
    if arguments.rows:
        rows = json.loads(arguments.rows.read_text())
    else:
        print(f"{'':48}" + "".join(f"{system:18}" for system in SYSTEMS))
        rows = collect(arguments.tuner, arguments.family, arguments.layer)
    print("\n" + summary(rows))
    if arguments.json:
        arguments.json.write_text(json.dumps(rows, indent=1) + "\n")
    if arguments.markdown:
        arguments.markdown.write_text(markdown(rows))


if __name__ == "__main__":
    main()
