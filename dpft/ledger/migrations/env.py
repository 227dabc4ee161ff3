"""Alembic's entry: the store gives the connection, inside a transaction of its own."""

from alembic import context

context.configure(connection=context.config.attributes["connection"])
context.run_migrations()
