"""Papermill runs, sweeps and the pages that lead to their results."""
