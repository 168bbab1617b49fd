"""report.html: one file that shows a run."""
