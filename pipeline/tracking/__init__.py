"""All that talks to MLflow.

`python -m pipeline.tracking` is the writer process: it delivers the journals of runs to the tracking store. In between
requests it reads the run's journal as it grows; if the trainer dies, it delivers what there is and marks the run
FAILED. `reading` brings runs and their histories back.
"""
