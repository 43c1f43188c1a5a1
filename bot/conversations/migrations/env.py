"""What Alembic runs: migrations on the connection it is given (see database.migrate), in that connection's transaction."""

from alembic import context

from bot.conversations.schema import metadata

context.configure(connection=context.config.attributes["connection"], target_metadata=metadata, transactional_ddl=True)
with context.begin_transaction():
    context.run_migrations()
