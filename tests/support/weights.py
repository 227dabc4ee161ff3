"""Models whose weights were moved, and what they give."""

import torch
from peft import LoraConfig, get_peft_model

IDS = torch.tensor([[3, 4, 5, 9], [6, 7, 8, 2]])


def move(model):
    """Move all that trains a little."""
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p += 0.1 * torch.randn_like(p)


def logits(model):
    with torch.no_grad():
        return model.eval()(input_ids=IDS).logits


def adapters(base, *names, kind=LoraConfig, **settings):
    """The base with one random adapter for each name, the first of them active."""
    config = kind(target_modules=["query", "value"], **{"r": 2, "init_lora_weights": False, **settings})
    model = get_peft_model(base, config, adapter_name=names[0])
    for name in names[1:]:
        model.add_adapter(name, config)
    return model
