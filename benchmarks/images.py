"""What training on pictures takes of memory, by how many there are.

    python benchmarks/images.py 1000 10000 50000

For each number so many JPEG files of 224² are written to Parquet, and a process of its own reads it as recipes do and
trains a head on a tiny ViT for a few steps. Printed are the peak of what that process held (anonymous memory), the peak
of the data's mapped pages, which the system takes back when it needs them, and seconds. Linux only.
"""

import argparse
import io
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

SIDE, STEPS, BATCH = 224, 5, 64
KINDS = ("RssAnon", "RssFile")


def write(path: Path, number: int) -> None:
    """``number`` pictures that differ, 10 kB each, as bytes in Parquet."""
    import numpy as np
    import pyarrow as pa
    import pyarrow.parquet as pq
    from PIL import Image

    random = np.random.default_rng(0)
    schema = pa.schema([("image", pa.binary()), ("label", pa.string())])
    with pq.ParquetWriter(path, schema) as writer:
        for start in range(0, number, 500):
            files = []
            for _ in range(min(500, number - start)):
                coarse = Image.fromarray(random.integers(256, size=(28, 28, 3), dtype=np.uint8))
                file = io.BytesIO()
                coarse.resize((SIDE, SIDE)).save(file, "JPEG", quality=80)
                files.append(file.getvalue())
            labels = ["ab"[i % 2] for i in range(len(files))]
            writer.write_table(pa.table({"image": files, "label": labels}, schema=schema))


def held() -> list[int]:
    """MiB of anonymous and of mapped memory."""
    lines = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text(encoding="ascii").splitlines())
    return [int(lines[kind].split()[0]) // 1024 for kind in KINDS]


def train(folder: Path, number: int) -> None:
    import transformers

    from dpft.recipe import Recipe
    from dpft.training.session import Session
    from dpft.workflows.setup import set_up

    config = transformers.ViTConfig(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16)
    transformers.ViTForImageClassification(config).save_pretrained(folder / "model")
    transformers.ViTImageProcessor().save_pretrained(folder / "model")
    recipe = Recipe.parse(
        {
            "subset": "head",
            "model": {"path": str(folder / "model")},
            "task": {"name": "image_classification", "labels": ["a", "b"], "flip": True},
            "data": {"train": str(folder / "rows.parquet"), "units": number},
            "privacy": {"noise_multiplier": 1.0, "delta": 1e-6, "batch_size": BATCH, "steps": STEPS},
        }
    )
    peak, over = held(), threading.Event()

    def watch() -> None:
        while not over.wait(0.02):
            peak[:] = map(max, peak, held())

    before, started = held(), time.perf_counter()
    watching = threading.Thread(target=watch)
    watching.start()
    setup = set_up(recipe)
    with Session(setup.model, recipe.plan(), setup.task, setup.train, folder / "run", memory=1 << 28) as session:
        for draw in session.draws():
            session.step(draw)
    over.set()
    watching.join()
    anonymous, mapped = (most - first for most, first in zip(peak, before, strict=True))
    size = (folder / "rows.parquet").stat().st_size >> 20
    print(f"{number:>8,} {size:>12,} {anonymous:>14,} {mapped:>12,} {time.perf_counter() - started:>9.0f}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("numbers", nargs="*", type=int, default=[1000, 10_000, 50_000], metavar="N")
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.folder:
        train(arguments.folder, *arguments.numbers)
        return
    print(f"{'pictures':>8} {'file (MiB)':>12} {'memory (MiB)':>14} {'mapped':>12} {'seconds':>9}", flush=True)
    for number in arguments.numbers:
        with tempfile.TemporaryDirectory() as folder:
            write(Path(folder) / "rows.parquet", number)
            subprocess.run([sys.executable, __file__, str(number), "--folder", folder], check=True)


if __name__ == "__main__":
    main()
