"""Data are what their files say, every complaint is true and comes before the first charge, and no copy is left."""

import json
import tempfile

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
import transformers
from transformers import TrainerCallback

from dpft.audit.canaries import Planting, make
from dpft.errors import RecipeError
from dpft.recipe import Recipe
from dpft.tasks import SequenceClassification
from dpft.training.batches import Examples
from dpft.training.data import check, load, read
from dpft.training.positions import positions
from dpft.workflows.setup import load_model, set_up
from dpft.workflows.train import train

ODD = [
    "None",
    "NA",
    "null",
    "nan",
    "",
    "01",
    "007",
    "1E5",
    "true",
    "1.0",
    " a ",
    'say "x"',
    "two\nlines",
    "a,b\tc",
    "ü",
]


def quoted(cells, separator):
    return separator.join('"' + cell.replace('"', '""') + '"' for cell in cells) + "\r\n"


@pytest.mark.parametrize(("ending", "separator"), [("csv", ","), ("tsv", "\t")])
@pytest.mark.parametrize("mark", ["", "\ufeff"])
def test_a_cell_is_the_text_that_stands_there(tmp_path, ending, separator, mark):
    path = tmp_path / f"a.{ending}"
    text = quoted(["text", "label"], separator) + "".join(quoted([cell, cell], separator) for cell in ODD)
    path.write_text(mark + text, encoding="utf-8", newline="")
    assert read(str(path)).to_list() == [{"text": cell, "label": cell} for cell in ODD]


def test_a_cell_may_be_a_long_document(tmp_path):
    (tmp_path / "a.csv").write_text("text\n" + "x" * 200_000 + "\n\n1\n")
    assert [len(text) for text in read(str(tmp_path / "a.csv"))["text"]] == [200_000, 1]


def test_json_keeps_what_stands_there(tmp_path):
    """In a column of several kinds no 7 becomes 7.0 or "7", and what a row lacks is missing."""
    rows = [{"a": 7, "b": "x"}, {"a": "7", "b": "y", "c": 1}, {"a": 7.5, "c": 0.5}, {"a": True, "c": [{"x": 1}, "y"]}]
    (tmp_path / "a.jsonl").write_text("\ufeff" + "\n".join(map(json.dumps, rows)) + "\n\n", encoding="utf-8")
    (tmp_path / "b.json").write_text(json.dumps(rows, indent=2))
    for name in ("a.jsonl", "b.json"):
        found = read(str(tmp_path / name))
        assert [found[i] for i in range(4)] == [{"a": None, "b": None, "c": None, **row} for row in rows]
        assert [type(value) for value in found["a"]] == [int, str, float, bool]


def written(tmp_path, file, content):
    """The path of what holds ``content``: a text, bytes, a table, or a saved data set."""
    path = tmp_path / file
    if isinstance(content, bytes):
        path.write_bytes(content)
    elif isinstance(content, str):
        path.write_text(content, encoding="utf-8")
    elif type(content) in (dict, pa.Table):
        pq.write_table(pa.table(content), path)
    else:
        content.save_to_disk(path)
    return str(path)


def labels(first, second):
    return f"text,label\nfever,{first}\ncough,{second}\n"


NAMES = datasets.Features({"text": datasets.Value("string"), "label": datasets.ClassLabel(names=["no", "yes"])})
NUMBERED = datasets.Dataset.from_dict({"text": ["fever", "cough"], "label": [1, 0]}, features=NAMES)


@pytest.mark.parametrize(
    ("file", "content", "declared"),
    [
        ("a.csv", labels("NA", "EU"), ["NA", "EU"]),
        ("a.csv", labels("01", "1"), ["01", "1"]),
        ("a.csv", labels("true", "false"), ["true", "false"]),
        ("a.csv", "text,label\n37,None\n38,no\n", ["None", "no"]),
        ("a.csv", "text,label\n" + "fever,1\n" * 20_049 + "fever,unknown\n", ["1", "unknown"]),
        ("a.jsonl", '{"text": "fever", "label": 1}\n' * 20_049 + '{"text": "fever", "label": "x"}', ["1", "x"]),
        ("a.jsonl", '{"text": "fever", "label": true}\n', ["true", "false"]),
        ("a.jsonl", '{"text": "fever", "label": true}\n', ["True", "False"]),
        ("a.parquet", {"text": ["fever"], "label": pa.array(["no"]).dictionary_encode()}, ["no", "yes"]),
        ("a.parquet", {"text": ["fever"], "label": [1]}, ["0", "1"]),
        ("a.parquet", NUMBERED.data.table, ["no", "yes"]),
        ("saved", NUMBERED, ["no", "yes"]),
        ("saved", NUMBERED.with_format("numpy"), ["no", "yes"]),
        ("saved", datasets.DatasetDict(train=NUMBERED), ["no", "yes"]),
    ],
)
def test_labels_are_what_the_file_says(tmp_path, recipe, file, content, declared):
    rows = read(written(tmp_path, file, content))
    assert rows.column_names == ["text", "label"]
    check(
        rows,
        SequenceClassification.Settings(name="sequence_classification", labels=declared),
        Recipe.parse(recipe).data,
        "data.train",
    )


@pytest.mark.parametrize(
    ("file", "content", "said"),
    [
        ("a.csv", labels("a", ""), "row 2 has no label in column 'label'"),
        ("a.csv", labels("a", "cancer"), "row 2 has a label in column 'label' .a text. that is not among the 4"),
        ("a.csv", labels("1", "01"), "row 2 has a label .* not among the 4"),
        ("a.csv", "text,label\nfever,a\n ,b\n", "row 2 has no text in column 'text'"),
        ("a.csv", "text,label\nfever,a\nfever\n", r"row 2 \(line 3\) has 1 cell, but the header has 2"),
        ("a.csv", 'text,label\n"two\nlines",a\n\na,b,cancer\n', r"row 2 \(line 5\) has 3 cells, but the header has 2"),
        ("a.csv", 'text,label\nfever,a\n"fever,a\n', "row 2 has a quotation mark that does not end its cell"),
        ("a.csv", 'text,label\nfever,a\n"say "x"",a\n', "row 2 has a quotation mark that does not end its cell"),
        ("a.csv", '"text"s,label\nfever,a\n', "header has a quotation mark"),
        ("a.csv", "text,text\nfever,a\n", "two columns 'text'"),
        ("a.csv", "", "a.csv is empty"),
        ("a.csv", "text,label\n", "data.train is empty"),
        ("a.csv", "text;label\nfever;a\n", "no column 'text': it has text;label"),
        ("a.csv", b"text,label\nfever,a\nf\xfcr,a\n", "a.csv line 3 is not UTF-8"),
        ("a.csv", "text,label\nfever,a\n".encode("utf-16"), "a.csv line 1 is not UTF-8"),
        ("a.jsonl", "", "a.jsonl is empty"),
        ("a.jsonl", '{"text": "fever", "label": "a"}\n{"text": "cancer"', "a.jsonl line 2 is not JSON"),
        ("a.json", '[{"text": "fever", "label": "a"},\n{"text": "cancer"', "a.json line 2 is not JSON"),
        ("a.jsonl", '{"text": "fever", "label": "a"}\n["cancer"]', "row 2 is a list, but a row is an object"),
        ("a.jsonl", '{"text": "fever", "label": "a"}\n{"text": "fever"}', "row 2 has no label in column 'label'"),
        (
            "a.jsonl",
            '{"text": "fever", "label": "a"}\n{"text": 37, "label": "a"}',
            "row 2 has a whole number in column",
        ),
        (
            "a.jsonl",
            '{"text": "fever", "label": 1}\n{"text": "x", "label": 1.0}',
            "row 2 has a float in column 'label'",
        ),
        ("a.jsonl", '{"text": "fever", "label": null}\n', "row 1 has no label"),
        ("a.jsonl", '{"text": "fever", "label": NaN}\n', "row 1 has no label"),
        ("a.jsonl", '{"text": [{"role": "user"}], "label": "a"}\n', "row 1 has a list .* apply_chat_template"),
        ("a.jsonl", '{"text": "\\ud83d", "label": "a"}\n', "Row 1 has half a character in column 'text'"),
        ("a.jsonl", '{"text": "x", "label": 1234567890123456789}\n', "line 1 has a whole number of over 18 digits"),
        ("a.parquet", {"text": ["fever"], "label": [[1]]}, "row 1 has a list in column 'label'"),
        ("a.parquet", {"text": ["fever"] * 2, "label": [1.0, None]}, "row 1 has a float in column 'label'"),
        ("a.parquet", {"text": [["fever"]], "label": ["a"]}, "row 1 has a list in column 'text'"),
        ("a.parquet", {"text": ["fever"], "label": pa.array([None], pa.string())}, "row 1 has no label"),
        ("a.parquet", b"PAR1 cancer", "a.parquet is not a whole Parquet file"),
        ("saved", NUMBERED.map(lambda row: {"label": -1}), "row 1 has no label"),
        (
            "saved",
            datasets.DatasetDict(test=NUMBERED, train=NUMBERED),
            "holds the splits test, train: name .*saved/train",
        ),
    ],
)
def test_what_cannot_be_learned_from_is_one_true_sentence(tmp_path, recipe, file, content, said):
    recipe["task"]["labels"] = ["a", "b", "None", "1"]
    recipe["data"]["train"] = written(tmp_path, file, content)
    with pytest.raises(RecipeError, match=said) as error:
        load(Recipe.parse(recipe))
    assert "cancer" not in str(error.value) and "\n" not in str(error.value)


def test_folders_that_are_no_data_set_say_what_to_name(tmp_path):
    with pytest.raises(RecipeError, match="folder without data"):
        read(str(tmp_path))
    with pytest.raises(RecipeError, match="list of data files is empty"):
        read([])
    (tmp_path / "b.csv").write_text("text\nx\n")
    (tmp_path / "a.CSV").write_text("text\nx\n")
    with pytest.raises(RecipeError, match="folder with 2 data files: name the files, such as .*a.CSV"):
        read(str(tmp_path))
    assert len(read([str(tmp_path / "a.CSV"), str(tmp_path / "b.csv")])) == 2


def test_files_of_different_columns_or_types_are_not_joined(tmp_path):
    for name, content in (("a.csv", "text\nx\n"), ("b.csv", "text,label\nx,a\n")):
        (tmp_path / name).write_text(content)
    with pytest.raises(RecipeError, match="different columns, text and text, label"):
        read([str(tmp_path / "a.csv"), str(tmp_path / "b.csv")])
    for name, ids in (("a.parquet", [7]), ("b.parquet", [7.0])):
        pq.write_table(pa.table({"patient": ids}), tmp_path / name)
    with pytest.raises(RecipeError, match="differ from file to file"):
        read([str(tmp_path / "a.parquet"), str(tmp_path / "b.parquet")])


def units_of(tmp_path, recipe, file, content, units):
    recipe["task"] = {"name": "causal_lm"}
    recipe["data"] = {"train": written(tmp_path, file, content), "units": units, "unit": "patient"}
    recipe["privacy"] |= {"batch_size": 1, "delta": 1e-4}
    rows, _ = load(Recipe.parse(recipe))

    class Characters:
        encode = staticmethod(lambda columns: [list(text) for text in columns["text"]])
        length = staticmethod(len)

    return sorted(map(len, Examples.encode(rows, Characters(), "patient").members))


@pytest.mark.parametrize(
    ("file", "content"),
    [
        ("a.csv", "text,patient\n" + "".join(f"note,{one}\n" for one in ["1E5", "100000", "10E4", "7", "007", "7.0"])),
        ("a.jsonl", "".join(f'{{"text": "note", "patient": {one}}}\n' for one in range(6))),
        ("a.parquet", {"text": ["note"] * 6, "patient": ["7", "07", "NA", "None", "nan", " 7"]}),
    ],
)
def test_no_two_people_become_one_by_how_their_ids_are_written(tmp_path, recipe, file, content):
    """T16."""
    assert units_of(tmp_path, recipe, file, content, 6) == [1] * 6


@pytest.mark.parametrize(
    ("file", "content", "said"),
    [
        ("a.csv", "text,patient\nnote,1\nnote,\n", "row 2 has no 'patient'"),
        ("a.jsonl", '{"text": "note", "patient": ["P1", "P2"]}\n' * 2, "row 1 has a list in unit column 'patient'"),
        (
            "a.jsonl",
            '{"text": "note", "patient": 7}\n{"text": "note", "patient": "7"}\n',
            "row 2 has a text .* earlier",
        ),
        ("a.jsonl", '{"text": "note", "patient": 1e5}\n', "row 1 has a float"),
        ("a.jsonl", '{"text": "note", "patient": 7}\n{"text": "note"}\n', "row 2 has no 'patient'"),
        ("a.parquet", {"text": ["note"] * 3, "patient": np.array([1, 1, np.nan])}, "row 1 has a float"),
    ],
)
def test_a_row_of_nobody_knows_whom_is_refused(tmp_path, recipe, file, content, said):
    """T16."""
    with pytest.raises(RecipeError, match=said):
        units_of(tmp_path, recipe, file, content, 2)


@pytest.mark.parametrize(
    ("file", "content"),
    [
        ("a.parquet", {"text": ["note"] * 5, "patient": np.array([np.nan, 1, 1, np.nan, np.nan])}),
        ("a.jsonl", '{"text": "note", "patient": NaN}\n' * 4),
    ],
)
def test_nobody_is_called_nan(tmp_path, recipe, file, content):
    """T16: had each NaN been a unit, one person's rows would have counted as several."""
    with pytest.raises(RecipeError, match="row 1 has no 'patient', so it is unknown whose it is"):
        units_of(tmp_path, recipe, file, content, 4)


def test_evaluation_s_rows_are_checked_before_anything_is_charged(recipe, tmp_path):
    with open(recipe["data"]["validation"], "a") as file:
        file.write("w1,,p1\n")
    with pytest.raises(RecipeError, match="data.validation row 10 has no label"):
        train(Recipe.parse(recipe), tmp_path / "run")
    assert not (tmp_path / "run").exists()


class Walks(TrainerCallback):
    """Looks for a row's bytes in every file but the data's own."""

    def __init__(self, folder, own, row):
        self.folder, self.own, self.row, self.times = folder, own, row, 0

    def check(self, *_, **__):
        self.times += 1
        for path in self.folder.rglob("*"):
            if path.is_file() and path not in self.own:
                assert self.row not in path.read_bytes(), path
                assert not path.name.startswith("cache-"), path  # an order of rows that datasets kept

    on_train_begin = on_step_end = on_train_end = check


@pytest.mark.parametrize("form", ["csv", "jsonl", "parquet", "saved"])
def test_no_file_holds_a_row_during_a_run_or_after_it(recipe, tmp_path, monkeypatch, form):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    row = b"w11 w22 w33 w44 w55 w9"
    rows = read(recipe["data"]["train"])
    data = tmp_path / f"data.{form}"
    write = {"csv": rows.to_csv, "jsonl": rows.to_json, "parquet": rows.to_parquet, "saved": rows.save_to_disk}
    write[form](data)
    own = {tmp_path / "train.csv", tmp_path / "validation.csv", data, *(data.rglob("*") if form == "saved" else ())}
    walks = Walks(tmp_path, own, row)
    assert any(row in path.read_bytes() for path in own if path.is_file()) or form == "parquet"
    recipe["data"] |= {"train": str(data), "validation": str(data), "validation_rows": 9}
    parsed = Recipe.parse(recipe)
    train(parsed, tmp_path / "run", callbacks=[walks])
    whole = make(Planting(canaries=10, kind="random-tokens"), parsed, load_model(parsed)[0]).planted(
        load(parsed)[0], parsed
    )
    walks.check()
    assert walks.times == 2 + 4 + 1 and row.decode() in whole["text"]


CONFIGS = {
    "bert": (transformers.BertConfig(max_position_embeddings=20, intermediate_size=16), 20),
    "roberta": (transformers.RobertaConfig(max_position_embeddings=20, intermediate_size=16, pad_token_id=1), 18),
    "gpt2": (transformers.GPT2Config(n_positions=20), 20),
    "opt": (transformers.OPTConfig(max_position_embeddings=20, ffn_dim=16, word_embed_proj_dim=16), 20),
    "t5": (transformers.T5Config(d_kv=8, d_ff=16, num_layers=1), None),
    "llama": (transformers.LlamaConfig(max_position_embeddings=20, intermediate_size=16), None),
    "deberta": (transformers.DebertaV2Config(position_biased_input=False, intermediate_size=16), None),
}


@pytest.mark.parametrize("family", CONFIGS)
def test_a_model_s_positions_are_what_its_longest_text_has(family):
    config, most = CONFIGS[family]
    config.vocab_size, config.hidden_size, config.num_hidden_layers, config.num_attention_heads = 60, 16, 1, 2
    model = transformers.AutoModel.from_config(config).eval()
    assert positions(model) == most
    if most is not None:
        model(input_ids=torch.full((1, most), 5))
        with pytest.raises((IndexError, RuntimeError)):
            model(input_ids=torch.full((1, most + 1), 5))


def test_a_length_beyond_the_model_s_positions_is_refused_before_anything_is_written(recipe, tmp_path):
    recipe["task"]["max_length"] = 33
    with pytest.raises(RecipeError, match="max_length is 33 tokens, but the model has positions for 32"):
        train(Recipe.parse(recipe), tmp_path / "run")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("subset", ["prompt_tuning(num_virtual_tokens=4)", "prefix_tuning(num_virtual_tokens=4)"])
def test_a_prompt_before_the_text_takes_positions(language, subset):
    language |= {"subset": subset}
    language["task"]["max_length"] = 61
    with pytest.raises(RecipeError, match="max_length is 61 tokens, but the model has positions for 60"):
        set_up(Recipe.parse(language))
    language["task"]["max_length"] = 60
    setup = set_up(Recipe.parse(language))
    batch = setup.task.collate([{"input_ids": [5] * 60, "labels": [5] * 60}])
    assert setup.task.losses(setup.model, batch).isfinite().all()


def test_by_default_texts_are_as_long_as_the_model_takes(recipe):
    task, model = load_model(Recipe.parse(recipe))
    assert positions(model) == task.max_length == 32
