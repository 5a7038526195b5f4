"""Sweeps: plan, jobs, workers (local processes or Ray tasks), search and summary run."""
