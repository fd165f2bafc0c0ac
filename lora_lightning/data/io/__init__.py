"""Reading of tables, streams and splits, with errors that name file, row and column."""
