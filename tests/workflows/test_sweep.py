"""A sweep is one table and one charge, however often it was killed on the way."""

import csv
import math
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from contextlib import nullcontext
from subprocess import PIPE

import psutil
import pytest
import transformers
from click.testing import CliRunner

from dpft.cli import main
from dpft.errors import BudgetError, RecipeError, SubsetError
from dpft.ledger import Ledger
from dpft.privacy import composition
from dpft.privacy.events import Event, merged
from dpft.recipe import Recipe
from dpft.runs import RunFolder
from dpft.runs.count import Count
from dpft.runs.sums import KeptSums
from dpft.runs.sweep import Sweep
from dpft.workflows import pool
from dpft.workflows.grid import Grid
from dpft.workflows.sweep import sweep
from dpft.workflows.train import train

STEPS = {"head": 64, "bias": 20}
SUBSETS = ["head", "bias"]

# A process that has imported what a sweep needs, and starts each one that is to be killed.
server = multiprocessing.get_context("forkserver")
server.set_forkserver_preload(["dpft.workflows.sweep", "dpft.training.trainer", "transformers.trainer", "peft"])


@pytest.fixture
def tables(recipe):
    """Of runs that descend in blocks of two steps, beside a head that does not."""
    recipe["privacy"] |= {"epsilon": 8.0, "steps": STEPS["bias"]}
    recipe["data"]["validation_is_public"] = True
    return recipe


@pytest.fixture
def account(tables, tmp_path, monkeypatch):
    """With room for two cells of ε = 8, and for what kills leave charged; not for three."""
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path / "home"))
    with (tmp_path / "train.csv").open() as file:
        rows = list(csv.DictReader(file))
    made = Ledger(str(tmp_path / "ledger.db")).create("notes", epsilon=17.0, delta=1e-3, rows=rows)
    tables["ledger"] = {"dataset": "notes", "url": str(tmp_path / "ledger.db")}
    return made


def steps_of(folder):
    return Count.read(RunFolder(str(folder)).releases_file).charged


def files(folder):
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


# -- killed, and gone on with ------------------------------------------------------------------------------------------


class AtStep(transformers.TrainerCallback):
    def __init__(self, action):
        self.action = action

    def on_step_end(self, args, state, control, **_):
        if state.global_step == 7:
            self.action()


def die():
    os.kill(os.getpid(), signal.SIGKILL)


def before(owner, name, *, after=False, only=lambda *facts: True, calls=1):
    """Die where ``owner.name`` is called, or has returned, for that time."""
    original, seen = getattr(owner, name), []

    def deadly(*facts, **more):
        wanted = only(*facts)
        seen.extend([1] if wanted else [])
        if wanted and len(seen) == calls and not after:
            die()
        found = original(*facts, **more)
        if wanted and len(seen) == calls and after:
            die()
        return found

    setattr(owner, name, deadly)


def of_bias(folder, *_):
    return "bias" in str(folder)


def kill_at(moment):
    import dpft.report
    from dpft.training.releases import Releases
    from dpft.workflows import train as training

    if moment == "a head's sum is counted and lost":
        before(KeptSums, "keep", calls=3)
    elif moment == "a head's sum is kept":
        before(KeptSums, "keep", calls=3, after=True)
    elif moment == "all is released and no weights are saved":
        last = lambda releases, number, *_: of_bias(releases.path) and number == STEPS["bias"]
        before(Releases, "charge", after=True, only=last)
    elif moment == "weights are saved and no record is written":
        before(training, "write", only=of_bias)
    elif moment == "the record is written and no card":
        before(dpft.report, "write_card", only=of_bias)
    elif moment == "the run has ended":
        before(RunFolder, "write_private", only=lambda run, file, *_: of_bias(run) and file == run.cell_file)


def killed_sweep(tables, output, moment, home):
    os.environ["XDG_DATA_HOME"] = home
    kill_at(moment)
    callbacks = [AtStep(die)] if moment == "a step was released" else []
    sweep(Recipe.parse(tables), output, subsets=SUBSETS, jobs=1, callbacks=lambda: callbacks)


MOMENTS = [
    "a head's sum is counted and lost",
    "a head's sum is kept",
    "a step was released",
    "all is released and no weights are saved",
    "weights are saved and no record is written",
    "the record is written and no card",
    "the run has ended",
]


def kill(tables, output, moment, home):
    child = server.Process(target=killed_sweep, args=(tables, output, moment, str(home)))
    child.start()
    child.join(300)
    assert child.exitcode == -signal.SIGKILL, moment


@pytest.mark.parametrize("moment", MOMENTS)
def test_a_killed_sweep_goes_on_and_pays_for_nothing_twice(tables, account, tmp_path, moment):
    """T15."""
    output = tmp_path / "sweep"
    kill(tables, output, moment, tmp_path / "home")
    done = sorted(path.parent.parent for path in output.rglob("private/cell.json"))
    kept, sums = [files(folder) for folder in done], files(output)[output / "head-epsilon-8-seed-0/sums.npy"]
    found = sweep(Recipe.parse(tables), output, subsets=SUBSETS, jobs=1)

    kinds = [(cell.kind, cell.subset) for cell in found.cells]
    assert kinds == [("untouched", ""), ("private", "head"), ("private", "bias")]
    assert all("accuracy" in cell.metrics for cell in found.cells)
    assert [files(folder) for folder in done] == kept  # what was done is as it was
    assert files(output)[output / "head-epsilon-8-seed-0/sums.npy"].startswith(sums)
    account.ledger.refresh()
    for run, (subset, steps) in zip(account.curve(), STEPS.items(), strict=True):
        folder = RunFolder(output / f"{subset}-epsilon-8-seed-0")
        assert steps_of(folder) == folder.record().released_steps == steps and not folder.record().interrupted
        # What was charged and not released when it was killed stays charged: a block of a run, or the rest of a head.
        lost = 0 if subset == "bias" else STEPS["head"]
        assert steps <= run["steps"] <= steps + (lost if moment.startswith("a head") else 0)
    spent = account.spent()
    assert sweep(Recipe.parse(tables), output, subsets=SUBSETS, jobs=1) == found and account.spent() == spent
    assert not list(output.rglob("checkpoint-*"))


def test_a_sweep_without_a_ledger_goes_on_with_what_was_counted(tables, tmp_path):
    """Killed twice, at a head and at a step: the record says what an undisturbed sweep says."""
    for moment in ("a head's sum is counted and lost", "a step was released"):
        kill(tables, tmp_path / "sweep", moment, tmp_path)
    assert steps_of(tmp_path / "sweep" / "bias-epsilon-8-seed-0") == 7
    found = sweep(Recipe.parse(tables), tmp_path / "sweep", subsets=SUBSETS, jobs=1)
    undisturbed = sweep(Recipe.parse(tables), tmp_path / "whole", subsets=SUBSETS, jobs=1)
    assert found.composed_epsilon == undisturbed.composed_epsilon
    for one, other in zip(found.cells, undisturbed.cells, strict=True):
        assert (one.kind, one.subset, one.epsilon, one.folder) == (
            other.kind,
            other.subset,
            other.epsilon,
            other.folder,
        )
        assert one.metrics.keys() == other.metrics.keys()
    assert found.cells[0].metrics == undisturbed.cells[0].metrics


# -- what it costs -----------------------------------------------------------------------------------------------------


def test_a_sweep_that_does_not_fit_is_refused_before_it_begins(tables, account, tmp_path):
    """T15: each of the three runs fits, and all of them do not."""
    (tmp_path / "recipe.toml").write_text(Recipe.parse(tables).to_toml())
    words = ["sweep", str(tmp_path / "recipe.toml"), "--output", str(tmp_path / "sweep")]
    three = [*words, "--subset", "head, bias, norms", "--epsilon"]
    result = CliRunner().invoke(main, [*three, "12"])
    assert result.exit_code == 3 and "3 private runs would take 'notes' from ε = 0 to " in result.output
    assert not (tmp_path / "sweep").exists() and account.spent() == 0
    assert CliRunner().invoke(main, [*three, "1,inf"]).exit_code == 1  # what no ledger can pay for
    account.spend([Event(1, None, None, 16.9, 0.0)], purpose="all of it")
    result = CliRunner().invoke(main, [*words, "--epsilon", "1"])
    assert result.exit_code == 3 and not (tmp_path / "sweep").exists()


def test_what_a_sweep_costs_together_is_composed_of_what_was_released(tables, tmp_path):
    found = sweep(Recipe.parse(tables), tmp_path / "sweep", subsets=SUBSETS, epsilons=[2.0, math.inf], jobs=1)
    private = [cell for cell in found.cells if cell.kind == "private"]
    events = merged(e for cell in private for e in RunFolder(tmp_path / "sweep" / cell.folder).record().events)
    assert found.composed_epsilon == composition.epsilon(events, 1e-3) > 2.0
    assert [row.setting for row in found.rows()] == ["untouched", "ε = 2", "non-private"] + ["ε = 2", "non-private"]
    assert Sweep.read(tmp_path / "sweep" / "private" / "sweep.json") == found
    published = Sweep.read(tmp_path / "sweep" / "sweep.json")
    assert [cell.kind for cell in published.cells] == ["untouched", "private", "private"]
    assert all(cell.seconds and cell.trainable_parameters for cell in private)


def test_a_run_that_the_ledger_ended_is_no_cell(tables, account, tmp_path):
    """Another run takes the budget while the sweep is under way."""
    take = lambda: account.spend([Event(1, None, None, 12.0, 0.0)], purpose="meanwhile")
    callback = AtStep(take)
    with pytest.raises(BudgetError, match=r"ended after \d+ of 20 steps"):
        sweep(Recipe.parse(tables), tmp_path / "sweep", subsets=["bias"], jobs=1, callbacks=lambda: [callback])
    with pytest.raises(BudgetError, match="nothing was begun"):
        sweep(Recipe.parse(tables), tmp_path / "sweep", subsets=["bias"], jobs=1)


# -- in several processes ----------------------------------------------------------------------------------------------


def dpft(*words, folder):
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    code = "from dpft.cli import main; main()"
    return subprocess.Popen([sys.executable, "-c", code, *words], cwd=folder, env=environment, stdout=PIPE, stderr=PIPE)


@pytest.mark.parametrize("where", [(), ("--ray", "local")], ids=["processes", "ray"])
def test_a_sweep_in_several_processes_ends_with_its_command_and_goes_on(tables, account, tmp_path, where):
    """T15: killed from outside, its cells end as well; no cell is tried again by itself."""
    if where:
        pytest.importorskip("ray")
    tables["privacy"]["steps"] = 200
    (tmp_path / "recipe.toml").write_text(Recipe.parse(tables).to_toml())
    words = ["sweep", "recipe.toml", "--output", "sweep", "--subset", "bias, norms", "--jobs", "2", "--json", *where]
    folders = [tmp_path / "sweep" / f"{subset}-epsilon-8-seed-0" for subset in ("bias", "norms")]
    command = dpft(*words, folder=tmp_path)
    wait_until(lambda: command.poll() is not None or max(map(steps_of, folders)) >= 25)
    below = psutil.Process(command.pid).children(recursive=True)
    command.kill()
    command.communicate()
    wait_until(lambda: not any(map(runs_still, below)))
    counted = [steps_of(folder) for folder in folders]
    # Ray's workers end when its own processes have noticed, which takes seconds: a short cell may be done by then.
    assert 25 <= max(counted) <= (200 if where else 199)

    output, said = dpft(*words, folder=tmp_path).communicate()
    assert "composed_epsilon" in output.decode(), said.decode()
    found = Sweep.read(tmp_path / "sweep" / "private" / "sweep.json")
    assert [steps_of(folder) for folder in folders] == [200, 200]
    private = [cell for cell in found.cells if cell.kind == "private"]
    assert all(cell.peak_memory > 100 * 2**20 and cell.metrics for cell in private)
    account.ledger.refresh()
    runs = [run["steps"] for run in account.curve()]
    assert len(runs) in (2, 3) and 400 <= sum(runs) <= 400 + 2 * 10, runs  # a block of each at most


def runs_still(process):
    """A process may end between two questions."""
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def wait_until(happened, seconds=240):
    end = time.monotonic() + seconds
    while not happened():
        assert time.monotonic() < end
        time.sleep(0.02)


def test_ray_never_tries_a_cell_twice(tables, tmp_path, monkeypatch):
    """T15: Ray runs a task again whose worker died, unless it is told not to; the first start had released."""
    ray = pytest.importorskip("ray")
    options = {}
    monkeypatch.setattr(ray, "remote", lambda **given: options.update(given) or (lambda function: Task()))
    monkeypatch.setattr(pool, "_cluster", lambda address, jobs: nullcontext(ray))
    monkeypatch.setattr(ray, "nodes", lambda: [{"Alive": True, "Resources": {"CPU": 8.0}}])
    monkeypatch.setattr(ray, "wait", lambda waiting: (waiting[:1], waiting[1:]))
    monkeypatch.setattr(ray, "get", lambda done: None)
    cells = Grid(["bias", "norms"]).cells(Recipe.parse(tables), tmp_path)
    pool.on_ray(cells, "somewhere", 2)
    assert options == {"max_retries": 0, "max_calls": 1, "num_cpus": 4, "num_gpus": 0}


class Task:
    def remote(self, group, folder, threads):
        return group[0].title


def test_an_error_of_a_cell_is_the_sweeps(tables, tmp_path):
    """In a process of its own as well; what can be known before is refused before the first cell."""
    tables["data"]["validation"] = str(tmp_path / "gone.csv")
    with pytest.raises(RecipeError, match=r"no data at .*gone.csv"):
        sweep(Recipe.parse(tables), tmp_path / "sweep", subsets=["bias"], jobs=2)
    assert not list((tmp_path / "sweep").rglob("releases.json"))


def test_what_is_done_is_not_run_again(tables, tmp_path, monkeypatch):
    """T15; and a longer list of settings runs those that are new."""
    before = sweep(Recipe.parse(tables), tmp_path / "sweep", subsets=["bias"], jobs=1)
    trained = []
    monkeypatch.setattr("dpft.workflows.train.train", lambda *facts, **_: trained.append(facts[1]))
    assert sweep(Recipe.parse(tables), tmp_path / "sweep", subsets=["bias"], jobs=1) == before and not trained
    with pytest.raises(RecipeError, match="no finished run"):  # as nothing trained it
        sweep(Recipe.parse(tables), tmp_path / "sweep", subsets=["bias", "head"], jobs=1)
    assert trained == [tmp_path / "sweep" / "head-epsilon-8-seed-0"]


# -- what is refused ---------------------------------------------------------------------------------------------------


def test_a_subset_that_finds_nothing_is_refused_before_others_are_paid_for(tables, tmp_path):
    with pytest.raises(SubsetError, match="nowhere"):
        sweep(Recipe.parse(tables), tmp_path / "sweep", subsets=["bias", "layers('nowhere')"], jobs=1)
    assert not (tmp_path / "sweep").exists()


def test_a_folder_of_another_recipe_is_refused(tables, tmp_path):
    """T15: else its run would stand for the cell, or be trained on with other settings."""
    recipe = Recipe.parse(tables)
    train(recipe.model_copy(update={"subset": "bias"}), tmp_path / "sweep" / "bias-epsilon-8-seed-0")
    tables["optimizer"] = {"learning_rate": 0.1}
    with pytest.raises(RecipeError, match="another recipe"):
        sweep(Recipe.parse(tables), tmp_path / "sweep", subsets=["bias"], jobs=1)
    tables["optimizer"] = {}
    found = sweep(Recipe.parse(tables), tmp_path / "sweep", subsets=["bias"], jobs=1)  # it is the same: taken as it is
    assert found.cells[-1].seconds < 1


def test_two_sweeps_in_one_folder_are_refused(tables, tmp_path):
    recipe, seen = Recipe.parse(tables), []

    def second(cells):
        with pytest.raises(RecipeError, match="Another sweep runs") as refused:
            sweep(recipe, tmp_path / "sweep", subsets=["bias"], jobs=1)
        seen.append(refused)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        sweep(recipe, tmp_path / "sweep", subsets=["bias"], jobs=1, watch=second)
    assert seen
