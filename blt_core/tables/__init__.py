"""TOML tables: where each value stands, what it must be, and tables in one line."""
