"""What a person reads of a run: the console's tables, report.html, figures."""
