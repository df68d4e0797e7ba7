#!/usr/bin/env bash
# Example: one retraining on two workers. Each worker has its own clone; the clones share only a DVC remote, a Prefect server
# and an MLflow server. One worker runs the data stages, and the other one trains. The script checks that the scores equal those
# of `dvc repro` in a single folder. A second retraining shows that nothing is computed again.
#
#     make setup
#     examples/two_workers.sh [FOLDER]                   # FOLDER receives the clones and logs; default: a temporary folder
#     REMOTE=ssh://... examples/two_workers.sh           # with another DVC remote than a folder
set -euo pipefail
project="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
folder="$(mkdir -p "${1:-$(mktemp -d)}" && cd "${1:-$_}" && pwd)"
remote="${REMOTE:-$folder/remote}"
prefect_port="${PREFECT_PORT:-4211}" mlflow_port="${MLFLOW_PORT:-5011}"
export PATH="$project/.venv/bin:$PATH" HF_HUB_OFFLINE=1 DO_NOT_TRACK=1 DVC_NO_ANALYTICS=1 OMP_NUM_THREADS=1
export PREFECT_SERVER_ANALYTICS_ENABLED=false MLFLOW_DISABLE_TELEMETRY=true MLFLOW_SERVER_ENABLE_JOB_EXECUTION=false
export PREFECT_API_URL="http://127.0.0.1:$prefect_port/api" MLFLOW_TRACKING_URI="http://127.0.0.1:$mlflow_port"
export ONEDIFF_POOLS="{cpu: onediff-cpu, gpu: onediff-gpu}"

say() { echo "== $*"; }
await() { for _ in $(seq 120); do curl -fsS "$1" > /dev/null 2>&1 && return; sleep 1; done; echo "$1 did not answer within two minutes" >&2; exit 1; }
in_clone() { (cd "$folder/$1" && shift && PYTHONPATH="$PWD" PREFECT_HOME="$PWD/.onediff/prefect" ONEDIFF_PROJECT="$PWD" PREFECT_FLOWS_HEARTBEAT_FREQUENCY=30 exec "$@"); }
trap 'kill $(jobs -p) 2> /dev/null || true; wait' EXIT

say "making three clones of this project with the preset micro, in $folder"
git clone --quiet "$project" "$folder/base"
cp "$project/presets/micro.yaml" "$folder/base/params.yaml"
git -C "$folder/base" rm -q --cached dvc.lock && rm -f "$folder/base/dvc.lock"
git -C "$folder/base" -c user.name=example -c user.email=example@localhost commit -qam "example: micro preset"
for name in data gpu alone; do
	git clone --quiet "$folder/base" "$folder/$name"
	git -C "$folder/$name" remote remove origin
	(cd "$folder/$name" && mkdir -p .onediff && dvc remote add --quiet --local --default shared "$remote")
done
rm -rf "$folder/base"

say "starting two servers and two workers; their logs are $folder/*.log"
mkdir -p "$folder/server"
(cd "$folder/server" && PREFECT_HOME="$PWD/prefect" exec prefect server start --port "$prefect_port" > ../prefect.log 2>&1) &
(cd "$folder/server" && exec mlflow server --port "$mlflow_port" --backend-store-uri "sqlite:///$PWD/mlflow.db" \
	--artifacts-destination "$PWD/artifacts" --workers 1 > ../mlflow.log 2>&1) &
await "$PREFECT_API_URL/health"; await "$MLFLOW_TRACKING_URI/health"
in_clone data python -m flows.deploy > "$folder/deploy.log" 2>&1
in_clone data prefect worker start --pool onediff-cpu --name data > "$folder/worker-data.log" 2>&1 &
in_clone gpu prefect worker start --pool onediff-gpu --name gpu > "$folder/worker-gpu.log" 2>&1 &

for round in first second; do
	say "$round retraining"
	in_clone data prefect deployment run retrain/retrain --watch > "$folder/$round.log" 2>&1 || { tail -n 20 "$folder/$round.log" "$folder"/worker-*.log; exit 1; }
	grep -oE "task-run\.(Ran|Restored|UpToDate) \* .*" "$folder/$round.log"
done

say "running dvc repro in one folder, to compare the scores"
in_clone alone env -u MLFLOW_TRACKING_URI dvc repro > "$folder/alone.log" 2>&1
for name in metrics gate stress; do
	cmp "$folder/data/data/$name.json" "$folder/alone/data/$name.json"
done
say "the scores of both ways are equal, byte for byte"
