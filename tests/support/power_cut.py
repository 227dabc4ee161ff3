"""What a power cut leaves, at worst: a process runs with its syncs recorded, and only what was synced is put back."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

SOURCE = Path(__file__).with_name("power_cut.c")
READY = "charged"  # what the child prints when its charge must have reached the disk


def cut_after(script: str, folder: Path, tmp_path: Path, **environment: str) -> Path:
    """Run ``script`` in ``folder`` until it prints ``charged``, cut the power, and return the folder as it is found
    again.

    Args:
        script: Python, whose working directory is ``folder``; whatever it does after that line is lost.
        folder: an existing folder; what lies in it at the start is on disk.
    """
    kept, found = tmp_path / "kept", tmp_path / "found"
    kept.mkdir()
    for path in (folder, *folder.rglob("*")):
        _keep(path, kept)
    variables = {"LD_PRELOAD": str(_library(tmp_path)), "CUT_WATCHED": str(folder.resolve()), "CUT_KEPT": str(kept)}
    root = str(Path(__file__).parents[2])
    child = subprocess.Popen(
        [sys.executable, "-c", script + f"\nprint({READY!r}, flush=True)\nimport time\ntime.sleep(600)"],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": root, **environment, **variables},
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        assert child.stdout.readline().strip() == READY
    finally:
        child.kill()
        child.wait()
        child.stdout.close()
    _put_back(folder.stat().st_ino, kept, found)
    return found


def _library(tmp_path: Path) -> Path:
    compiler = shutil.which("cc")
    if compiler is None or not sys.platform.startswith("linux"):
        pytest.skip("no C compiler on Linux, with which a process's syncs are recorded")
    library = tmp_path / "power_cut.so"
    subprocess.run([compiler, "-shared", "-fPIC", "-O1", "-o", library, SOURCE, "-ldl"], check=True)
    return library


def _keep(path: Path, kept: Path) -> None:
    """As the preloaded library does it."""
    inode = path.stat().st_ino
    if path.is_dir():
        names = "".join(f"{entry.stat().st_ino} {entry.name}\n" for entry in path.iterdir())
        (kept / f"{inode}.folder").write_text(names, encoding="utf-8")
    else:
        shutil.copyfile(path, kept / f"{inode}.file")


def _put_back(inode: int, kept: Path, place: Path) -> None:
    """A name without synced content is an empty file, and a folder without synced names an empty folder."""
    names = kept / f"{inode}.folder"
    place.mkdir()
    for line in names.read_text(encoding="utf-8").splitlines() if names.exists() else ():
        number, name = line.split(" ", 1)
        if (kept / f"{number}.folder").exists():
            _put_back(int(number), kept, place / name)
        elif (kept / f"{number}.file").exists():
            shutil.copyfile(kept / f"{number}.file", place / name)
        else:
            (place / name).touch()
