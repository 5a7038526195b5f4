"""Everything that talks to MLflow.

A training logs to a run (`mlflow_run.py`), which appends to the journal in its folder. The writer process
(`writer.py` starts it, `__main__.py` is its program) delivers the journal to the tracking store (`delivery.py`); if the
trainer dies, it delivers the rest and marks the run FAILED. `stored_runs.py` reads runs back.
"""
