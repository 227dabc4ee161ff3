"""Predict a number from a text, such as the length of a stay from a note on admission."""

from pydantic import Field

from dpft.recipe import TaskTable
from dpft.tasks import Task
from dpft.tasks.losses import pad_features, without_labels
from dpft.tasks.registry import task
from dpft.values import Column


@task("text_regression")
class TextRegression(Task):
    """A number for each text. The scale is declared, because the greatest number of the data is somebody's."""

    class Settings(TaskTable):
        text: str = Field("text", description="The column with the text.")
        number: str = Field("number", description="The column with the number.")
        scale: float = Field(1.0, gt=0, description="A usual size of the numbers, declared and public.")
        max_length: int | None = Field(None, ge=4, description="Texts are cut after this many tokens, by default 128.")

        @property
        def columns(self):
            return {self.text: Column("text"), self.number: Column("number")}

    headline, adds_layers = "mae", True
    template = {"subset": "lora(rank=8) + head", "task": {"scale": 1.0}}

    def __init__(self, tokenizer, settings):
        self.tokenizer, self.settings, self.max_length = tokenizer, settings, 128

    @classmethod
    def load(cls, settings, source):
        tokenizer = source.processor()
        model = source.labelled_model("AutoModelForSequenceClassification", [settings.number], tokenizer)
        return cls(tokenizer, settings), model

    def save(self, folder):
        self.tokenizer.save_pretrained(folder)

    def examples(self):
        return {self.settings.text: ["A short stay.", "A stay of some weeks."], self.settings.number: [3, 20.5]}

    def encode(self, rows):
        texts = self.tokenizer(list(rows[self.settings.text]), truncation=True, max_length=self.max_length)["input_ids"]
        numbers = [float(number) / self.settings.scale for number in rows[self.settings.number]]
        return [{"input_ids": ids, "labels": number} for ids, number in zip(texts, numbers, strict=True)]

    def collate(self, features):
        return pad_features(features, self.tokenizer.pad_token_id or 0, token_labels=False)

    def losses(self, model, batch):
        return (model(**without_labels(batch)).logits.squeeze(-1).float() - batch["labels"]) ** 2

    def evaluate(self, model, batches):
        errors = [error for batch in batches for error in self.losses(model, batch).sqrt().tolist()]
        return {"mae": self.settings.scale * sum(errors) / max(len(errors), 1), "examples": len(errors)}
