"""A stock training with Opacus, to be audited as anybody else's:

    dpft audit command --recipe RECIPE --claimed 1 --output DIR -- \\
        python benchmarks/opacus_training.py {data} {out} --tuner prompt

An encoder learns the chapter of diagnoses with PEFT under Opacus's PrivacyEngine, with its defaults. ``--tuner prompt``
trains a prompt alone, whose gradient Opacus takes for a per-sample one without a word (docs/pitfalls.md, T3); ``lora``
is what it is made for.
``--epsilon 0`` trains without privacy, whatever is claimed.
"""

import argparse
import csv
import os
import warnings

import peft
import torch
import transformers
from opacus import PrivacyEngine

os.environ.setdefault("HF_HUB_OFFLINE", "1")
warnings.simplefilter("ignore")
TUNERS = {
    "lora": lambda: peft.LoraConfig(task_type="SEQ_CLS", r=16, target_modules="all-linear"),
    "prompt": lambda: peft.PromptTuningConfig(task_type="SEQ_CLS", num_virtual_tokens=8),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data")
    parser.add_argument("out")
    parser.add_argument("--tuner", choices=list(TUNERS), default="lora")
    parser.add_argument("--epsilon", type=float, default=1.0)
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument("--batch", type=int, default=250)
    parser.add_argument("--learning-rate", type=float, default=3e-3)
    arguments = parser.parse_args()
    path = os.path.join(os.environ["DPFT_MODELS"], "minilm-l6")
    transformers.set_seed(0)
    tokenizer = transformers.AutoTokenizer.from_pretrained(path)
    model = transformers.AutoModelForSequenceClassification.from_pretrained(path, num_labels=22)
    model = peft.get_peft_model(model, TUNERS[arguments.tuner]()).train()
    if arguments.tuner == "prompt":  # with the head beside it, Opacus ends with an error: their batches are not as long
        for name, parameter in model.named_parameters():
            parameter.requires_grad_("prompt" in name)
    with open(arguments.data, newline="", encoding="utf-8") as file:
        rows = [(row["diagnosis"], int(row["chapter"].split()[-1]) - 1) for row in csv.DictReader(file)]
    collate = lambda part: {
        **tokenizer([text for text, _ in part], padding=True, truncation=True, max_length=32, return_tensors="pt"),
        "labels": torch.tensor([label for _, label in part]),
    }
    loader = torch.utils.data.DataLoader(rows, batch_size=arguments.batch, shuffle=True, collate_fn=collate)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.Adam(trained, lr=arguments.learning_rate)
    wrapped = model
    if arguments.epsilon:
        wrapped, optimizer, loader = PrivacyEngine().make_private_with_epsilon(
            module=model,
            optimizer=optimizer,
            data_loader=loader,
            target_epsilon=arguments.epsilon,
            target_delta=1e-5,
            epochs=arguments.epochs,
            max_grad_norm=1.0,
        )
        print(f"noise multiplier {optimizer.noise_multiplier:.3f}")
    for _ in range(arguments.epochs):
        for batch in loader:
            optimizer.zero_grad()
            wrapped(**batch).loss.backward()
            optimizer.step()
    model.save_pretrained(arguments.out)


if __name__ == "__main__":
    main()
