"""The database layer: engines, tables and all SQL."""
