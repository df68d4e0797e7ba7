"""Prefect server, MLflow server, workers and the database behind them, as background processes of this machine.

    python -m flows.services start | status [--json] | stop | backup DIR | restore DIR | upgrade

`plan.py` says what runs, `background.py` starts and ends it, `postgres.py` and `databases.py` keep what it writes.
All of it lies in one folder (runtime.yaml: services.folder) and listens on 127.0.0.1.
"""
