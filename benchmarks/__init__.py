"""Runnable benchmarks of dc-replay: the data they run on, the results they keep, the reports."""
