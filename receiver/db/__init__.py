"""Everything that is SQL: engine, tables, inbox, outbox, leases, migrations."""
