"""How every benchmark gives out what it found."""

import argparse
import json
import os
from pathlib import Path


def options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", action="store_true", help="print the JSON instead of a line of text")
    parser.add_argument("--output", type=Path, help="also write the JSON here")


def circumstances(device: str = "cpu") -> dict:
    """Where and with which versions something was measured."""
    import torch

    from dpft.workflows.record import versions

    hardware = f"{os.cpu_count()} cores" if device == "cpu" else torch.cuda.get_device_name()
    return {"hardware": hardware, "versions": versions()}


def deliver(found: dict, arguments: argparse.Namespace, text: str = "") -> None:
    if arguments.output:
        arguments.output.write_text(json.dumps(found, indent=2) + "\n")
    if arguments.json:
        print(json.dumps(found, indent=2))
    elif text:
        print(text)
