"""SQL over a store, by DuckDB, which is imported here alone. It is optional: pip install duckdb."""
