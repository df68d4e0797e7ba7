"""Run a Prefect server, an MLflow server, workers and their database as background processes of this machine.

    python -m flows.services start | status [--json] | stop | backup DIR | restore DIR | upgrade

`__main__.py` implements these commands, `topology.py` describes the services, `background.py` starts and ends their
processes, `postgres.py` and `databases.py` manage the data. All files are in one folder (runtime.yaml:
services.folder), and the servers listen on 127.0.0.1.
"""
