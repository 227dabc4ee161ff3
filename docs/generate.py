"""Generate docs/cli.md, docs/recipe.md and docs/pitfalls.md; with --check, say which are out of date (exit 1)."""

import sys
import tomllib
from pathlib import Path

import click

DOCS = Path(__file__).parent
MUTANTS = DOCS.parent / "tests" / "mutants"


def cli() -> str:
    """The help of every command, as the terminal shows it."""
    from dpft.cli import COMMANDS, main

    parts = [
        "# Commands\n\nResults go to standard output, progress to standard error. Exit codes: 0 done, 1 an error in one sentence, 2 wrong usage, 3 the budget does not allow it."
    ]
    commands = {name: main.get_command(None, name) for name in COMMANDS}
    for name, command in list(commands.items()):
        commands |= {f"{name} {inner}": made for inner, made in getattr(command, "commands", {}).items()}
    for name, command in sorted(commands.items(), key=lambda item: list(COMMANDS).index(item[0].split()[0])):
        context = click.Context(command, info_name=f"dpft {name}", max_content_width=100, terminal_width=100)
        parts.append(f"## dpft {name}\n\n```\n{command.get_help(context)}\n```")
    return "\n\n".join(parts) + "\n"


def recipe() -> str:
    """Every key of a recipe."""
    from pydantic import BaseModel
    from pydantic_core import PydanticUndefined

    from dpft.recipe import Recipe
    from dpft.tasks.registry import own

    lines = [
        "# Recipe",
        "",
        "One TOML file describes a run. It holds public information only. `dpft init` writes one to start from; `--set table.key=value` overrides.",
        "",
    ]
    lines += ["| key | default | meaning |", "| --- | --- | --- |"]

    def row(name, field):
        default = (
            "required"
            if field.default is PydanticUndefined
            else "–"
            if field.default is None
            else f"`{field.default!r}`"
        )
        lines.append(f"| `{name}` | {default} | {field.description or ''} |")

    for key, field in Recipe.model_fields.items():
        if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
            for name, inner in field.annotation.model_fields.items():
                row(f"{key}.{name}", inner)
        else:
            row(key, field)
    for task in sorted(own(), key=lambda task: task.name):
        lines += ["", f'## [task] with name = "{task.name}"', "", task.__doc__.strip().splitlines()[0], ""]
        lines += ["| key | default | meaning |", "| --- | --- | --- |"]
        for name, field in task.Settings.model_fields.items():
            if name != "name":
                row(f"task.{name}", field)
    return "\n".join(lines) + "\n"


def pitfalls() -> str:
    """The T-rows with their defences, tests and mutants."""
    mutants: dict[str, list[str]] = {}
    for path in sorted(MUTANTS.glob("*.toml")):
        mutant = tomllib.loads(path.read_text(encoding="utf-8"))
        seen = ", which `dpft audit step` sees" if "audit" in mutant else ""
        mutants.setdefault(mutant["row"], []).append(f"{mutant['break']}{seen} (`{path.name}`)")
    lines = [
        "# Pitfalls",
        "",
        "Ways in which a printed ε becomes untrue without any error, and what dpft does about each. `make mutants` re-introduces the breaks one by one and shows which test catches each.",
        "",
    ]
    for key, row in tomllib.loads((DOCS / "pitfalls.toml").read_text()).items():
        lines += [f"## {key} {row['title']}", "", f"Severity: {row['severity']}. Who must act: {row['who']}.", ""]
        lines += [f"**The break.** {row['break']}", "", f"**The defence.** {row['defence']}", ""]
        if "seen" in row:
            lines += ["| in dpft 0.1.0 | severity | who must act |", "| --- | --- | --- |"]
            lines += [f"| {one['title']} | {one['severity']} | {one['who']} |" for one in row["seen"]] + [""]
        lines += ["Tests: " + ", ".join(f"`{test}`" for test in row["tests"]) + ".", ""]
        if key in mutants:
            lines += ["Mutants: " + "; ".join(mutants[key]) + ".", ""]
    return "\n".join(lines).rstrip() + "\n"


def main(check: bool) -> int:
    stale = []
    for name, make in {"cli.md": cli, "recipe.md": recipe, "pitfalls.md": pitfalls}.items():
        text = make()
        if check and (not (DOCS / name).exists() or (DOCS / name).read_text() != text):
            stale.append(name)
        elif not check:
            (DOCS / name).write_text(text)
    for name in stale:
        print(f"docs/{name} is out of date: run `make docs`")
    return 1 if stale else 0


if __name__ == "__main__":
    sys.exit(main("--check" in sys.argv[1:]))
