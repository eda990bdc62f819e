#!/usr/bin/env bash
# One machine, in the foreground: Ctrl-C ends this Ray and no other. `hamdist cluster start` does the
# same in the background, and writes the cluster file.
#   cluster-configs/one-machine.sh
#   hamdist launch digits --cluster ~/.hamdist/one-machine/cluster.yaml
# Verified: 2026-11-22, Ray 2.60, by running both lines on Linux (x86_64, 2 cores); ended by SIGTERM.
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
port=${PORT:-6379} jobs_port=${JOBS_PORT:-8265}
folder=${FOLDER:-$HOME/.hamdist/one-machine}

umask 077
mkdir -p "$folder/storage"
[ -s "$folder/token" ] || python -c 'import secrets; print(secrets.token_hex(32))' >"$folder/token"
cat >"$folder/cluster.yaml" <<FILE
jobs: http://127.0.0.1:$jobs_port
token: $folder/token
storage: $folder/storage
python: $(command -v python)
FILE
umask 022

set -a
. "$here/ray.env"
RAY_AUTH_MODE=token
RAY_AUTH_TOKEN_PATH=$folder/token
set +a
# Ray's files in a folder of its own, with a short name (its sockets' paths have 107 bytes): in the
# usual /tmp/ray what it notes there would outlive it, and mislead the next `ray`.
files=$(mktemp -d /tmp/hdray-XXXXXX)
trap 'kill "$!" 2>/dev/null || true' INT TERM
ray start --head --block --port="$port" --disable-usage-stats --temp-dir="$files/r" \
  --dashboard-host=127.0.0.1 --dashboard-port="$jobs_port" --object-store-memory=104857600 &
while status=0; do
  wait "$!" || status=$? # (a signal ends the wait before Ray has ended)
  kill -0 "$!" 2>/dev/null || break
done
rm -rf "$files"
exit "$status"
