"""How the annotation formats read their files: JSON, tables, Parquet, URLs."""
