"""What an account asks for a release: the price of its own adjacency, and nothing after its end."""

from datetime import UTC, datetime, timedelta

import pytest

from dpft.errors import LedgerError
from dpft.ledger import Ledger
from dpft.privacy.composition import Event


@pytest.mark.parametrize(("adjacency", "price"), [("add-or-remove-one", 3.341), ("replace-one", 7.511)])
def test_an_account_asks_the_price_of_its_own_adjacency(tmp_path, adjacency, price):
    """T15, T18: ten releases at σ = 4 of all units are 10^½/4-GDP where a unit is removed, and 10^½/2-GDP where it is
    replaced."""
    notes = Ledger(str(tmp_path / "ledger.db")).create("notes", epsilon=8.0, delta=1e-5, adjacency=adjacency)
    assert notes.spend([Event(10, 4.0, 1.0)], purpose="another tool's") == pytest.approx(price, abs=1e-3)


def test_what_another_tool_releases_is_not_charged_after_the_end(tmp_path):
    yesterday = datetime.now(UTC).date() - timedelta(days=1)
    notes = Ledger(str(tmp_path / "ledger.db")).create("notes", epsilon=8.0, delta=1e-5, expires=yesterday)
    with pytest.raises(LedgerError, match=f"ended on {yesterday}"):
        notes.spend([Event(10, 4.0, 1.0)], purpose="another tool's")
    assert notes.spent() == 0 and not notes.record.runs
