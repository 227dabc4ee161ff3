"""Cards of folders that other versions of dpft wrote."""

import itertools
import json
import shutil
from pathlib import Path

import pytest
from markdown_it import MarkdownIt

from dpft.errors import RecipeError
from dpft.privacy import accounting
from dpft.report import write_card
from dpft.report.meaning import of_run
from dpft.runs import RunFolder, RunRecord

OLD = Path(__file__).parent / "run-0.1.0"  # as 0.1.0 left it, with a ledger, changed rows and an audit
FACTS = json.loads((OLD / "run.json").read_text())
REQUIRED = {name for name, field in RunRecord.model_fields.items() if field.is_required()}
ENDS = ["Released and covered", "Private, not covered", "across runs", "Assumed"]


@pytest.fixture
def folder(tmp_path):
    return Path(shutil.copytree(OLD, tmp_path / "run"))


def rewrite(folder, **changes):
    path = folder / "run.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def items_of(markdown):
    """The list items, as a reader of the rendered card sees them."""
    tokens = MarkdownIt().parse(markdown)
    return [after.content for token, _, after in zip(tokens, tokens[1:], tokens[2:], strict=False)
            if token.type == "list_item_open"]  # fmt: skip


@pytest.mark.parametrize(
    ("ledger", "overlap", "metrics", "audit", "private"), list(itertools.product([True, False], repeat=5))
)
def test_every_item_of_the_card_is_an_item_of_its_own(folder, ledger, overlap, metrics, audit, private):
    account = {**FACTS["ledger"], "overlap": 0.875 if overlap else None}
    rewrite(folder, ledger=account if ledger else None, metrics=FACTS["metrics"] if metrics else None, private=private)
    if not audit:
        (folder / "audit.json").unlink()
    text, page = (path.read_text(encoding="utf-8") for path in write_card(folder))
    items = items_of(text)
    assert len(items) == 3 * metrics + 3 * audit + len(ENDS) == page.count("<li>") + 3 * metrics
    assert all(words in item for words, item in zip(ENDS, items[-4:], strict=True))
    assert not any("- " in item.splitlines()[-1][-3:] or "\n-" in item for item in items)
    assert ("about 87.5 % of the rows" in text) == (ledger and overlap)


def test_the_card_of_an_old_run_is_made_again(folder):
    text = write_card(folder)[0].read_text(encoding="utf-8")
    assert "**ε = 2 at δ = 0.001**" in text and "had spent ε = 2 of 8 at δ = 0.001 over 1 run when" in text
    assert of_run(folder).epsilon == pytest.approx(1.99983, rel=1e-4)


def test_the_second_opinion_is_of_what_was_released_and_derived_anew(folder):
    """What stands in the record may be of a whole plan that ended early, or of an accountant since corrected."""
    rewrite(folder, epsilon_rdp=0.1, events=[{**FACTS["events"][0], "count": 2}], released_steps=2, interrupted=True)
    (event,) = RunFolder(folder).record().events
    rdp = accounting.epsilon_rdp(event.dp_event, 1e-3)
    assert 1.7 < rdp < 2.53
    assert f"Rényi DP: {rdp + 0.005:.2f})" in write_card(folder)[0].read_text(encoding="utf-8")


@pytest.mark.parametrize("key", sorted(set(FACTS) - REQUIRED))
def test_a_fact_that_a_version_does_not_record_leaves_the_rest_of_the_card(folder, key):
    record = json.loads((folder / "run.json").read_text())
    del record[key]
    (folder / "run.json").write_text(json.dumps(record))
    for path in write_card(folder):
        text = path.read_text(encoding="utf-8")
        assert "ε = 2" in text and "None" not in text and "Undefined" not in text


@pytest.mark.parametrize("key", ["spent", "budget", "delta", "runs", "overlap", "run"])
def test_an_account_may_keep_facts_to_itself(folder, key):
    account = dict(FACTS["ledger"])
    del account[key]
    rewrite(folder, ledger=account)
    assert "Counted across runs: the ledger's account `notes`" in write_card(folder)[0].read_text(encoding="utf-8")


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("{", "is not JSON"),
        ("[]", "no JSON object"),
        ('{"private": true}', "lacks guarantee, delta"),
        ("7", "no JSON object"),
    ],
)
def test_a_damaged_record_is_one_sentence(folder, content, said):
    (folder / "run.json").write_text(content)
    for read in (write_card, of_run):
        with pytest.raises(RecipeError, match=said):
            read(folder)


def test_a_damaged_audit_is_one_sentence(folder):
    (folder / "audit.json").write_text("{")
    with pytest.raises(RecipeError, match="audit.json is not JSON"):
        write_card(folder)
