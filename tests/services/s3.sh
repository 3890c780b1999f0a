#!/usr/bin/env bash
# A private S3 server on loopback, in memory: moto in its own Python environment.
#
#   s3.sh install       create that environment unless it exists
#   s3.sh start DIR     start it unless it runs; keeps its port across starts
#   s3.sh kill DIR      SIGKILL; its data is lost
#   s3.sh env DIR       print its address and keys as shell assignments
set -euo pipefail
. "$(dirname "$0")/lib.sh"

python=${BATON_TEST_S3_PYTHON:-${XDG_CACHE_HOME:-$HOME/.cache}/baton-moto-5}

# Created elsewhere and renamed when complete, so that an interrupted installation is not used.
install() {
  [ ! -x "$python/bin/moto_server" ] || return 0
  echo "installing moto into $python"
  rm -rf "$python"
  python3 -m venv "$python.new"
  "$python.new/bin/python" -m pip install --quiet --disable-pip-version-check 'moto[server]>=5,<6'
  # A script of pip has the path of its environment in the first line.
  sed -i "1s|$python.new|$python|" "$python.new/bin/moto_server"
  mv "$python.new" "$python"
}

start() {
  local port tries=600
  running "$dir/server.pid" && return
  port=$(settle_port "$dir" "" 1)
  setsid "$python/bin/moto_server" -H 127.0.0.1 -p "$port" </dev/null >"$dir/server.log" 2>&1 &
  echo $! >"$dir/server.pid"
  until listening "$port"; do
    if [ $((tries -= 1)) -lt 0 ] || ! running "$dir/server.pid"; then
      tail -n 15 "$dir/server.log" >&2
      exit 1
    fi
    sleep 0.05
  done
}

verb=${1:?verb}
if [ "$verb" != install ]; then
  mkdir -p "${2:?directory}"
  dir=$(cd "$2" && pwd)
fi
case $verb in
  install) install ;;
  start) start ;;
  kill)
    if running "$dir/server.pid"; then kill -KILL "$(cat "$dir/server.pid")"; fi
    await_end "$dir/server.pid" 10
    ;;
  env)
    # The server accepts any keys.
    echo "BATON_TEST_S3=http://127.0.0.1:$(cat "$dir/port") AWS_ACCESS_KEY_ID=test AWS_SECRET_ACCESS_KEY=s3cret" ;;
  *) echo "s3.sh: unknown verb $verb" >&2; exit 2 ;;
esac
