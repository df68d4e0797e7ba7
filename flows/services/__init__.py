"""Prefect server, MLflow server, workers and the database behind them, as background processes of this machine.

    python -m flows.services start | status [--json] | stop | backup DIR | restore DIR | upgrade

`__main__.py` has these commands, `topology.py` describes the services, `background.py` starts and ends their processes,
`postgres.py` and `databases.py` look after the data. All files are in one folder (runtime.yaml: services.folder), and
the servers listen on 127.0.0.1.
"""
