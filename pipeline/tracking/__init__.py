"""Tracking in MLflow: log runs, deliver them to the tracking store, and read them back.

Training logs to an `MlflowRun` (`mlflow_run.py`), which appends to the journal in the run's folder. The writer process
(started by `writer_client.py`, main program `__main__.py`) delivers the journal to the store (`delivery.py`). If the
trainer dies, it delivers the rest and marks the run FAILED. `stored_runs.py` reads runs from the store.
"""
