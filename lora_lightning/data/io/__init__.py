"""Reading: tables, streams, splits, and faults that name file, row and column."""
