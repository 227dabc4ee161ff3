"""The entries and the signed end; databases refuse to change or remove an entry."""

import sqlalchemy as sa
from alembic import op

revision, down_revision = "0001", None

REFUSAL = "the ledger is append-only"


def upgrade() -> None:
    text = lambda name: sa.Column(name, sa.Text, nullable=False)
    seq = sa.BigInteger().with_variant(sa.Integer, "sqlite")
    op.create_table(
        "entries",
        sa.Column("seq", seq, primary_key=True, autoincrement=False),
        *map(text, ("dataset", "kind", "body", "previous", "hash", "signature")),
    )
    op.create_table(
        "head",
        sa.Column("id", sa.Integer, primary_key=True),
        sa.Column("seq", sa.BigInteger, nullable=False),
        text("hash"),
        text("signature"),
    )
    if op.get_bind().dialect.name == "sqlite":
        for action in ("UPDATE", "DELETE"):
            op.execute(
                f"CREATE TRIGGER no_{action.lower()} BEFORE {action} ON entries BEGIN SELECT RAISE(ABORT, "
                f"'{REFUSAL}'); END"
            )
    else:
        op.execute(
            f"CREATE FUNCTION dpft_refuse() RETURNS trigger LANGUAGE plpgsql AS "
            f"$$ BEGIN RAISE EXCEPTION '{REFUSAL}'; END $$"
        )
        op.execute(
            "CREATE TRIGGER append_only BEFORE UPDATE OR DELETE OR TRUNCATE ON entries "
            "FOR EACH STATEMENT EXECUTE FUNCTION dpft_refuse()"
        )


def downgrade() -> None:
    raise NotImplementedError("A ledger is never taken back to an older form: export it and import it there.")
