#!/usr/bin/env bash
# A private PostgreSQL on loopback with full durability (fsync and synchronous_commit on), as root or as any user.
#
#   postgres.sh start DIR [PORT]   start it unless it runs; keeps its port across starts
#   postgres.sh stop DIR           clean stop
#   postgres.sh kill DIR           SIGKILL the server and all its backends; `start` recovers what was committed
#   postgres.sh restart DIR        clean stop, start
#   postgres.sh save DIR           clean stop, copy its data, start
#   postgres.sh restore DIR        SIGKILL, start with the copy
#   postgres.sh disk DIR MB        before the first start: puts its data on a disk in memory of this size (needs root)
#   postgres.sh end DIR            SIGKILL, and remove that disk
#   postgres.sh env DIR            print its address as a shell assignment
set -euo pipefail
. "$(dirname "$0")/lib.sh"

verb=${1:?verb} dir=${2:?directory}
mkdir -p "$dir"
dir=$(cd "$dir" && pwd)
bin=$(ls -d /usr/lib/postgresql/*/bin | sort -V | tail -n 1)
pid_file=$dir/data/postmaster.pid

# PostgreSQL refuses to run as root: the packaged user runs it, from a directory that it can enter.
unprivileged() {
  if [ "$(id -u)" = 0 ]; then
    (cd / && exec setpriv --reuid=postgres --regid=postgres --init-groups env HOME="$dir" "$@")
  else
    "$@"
  fi
}

# The first line of postmaster.pid is the pid; the other lines are not used.
running_server() {
  local pid
  pid=$(head -n 1 "$pid_file" 2>/dev/null) && echo "$pid" >"$dir/server.pid" && running "$dir/server.pid"
}

create() {
  unprivileged "$bin/initdb" -D "$dir/data" -U baton -A trust -E UTF8 --locale=C --no-sync >"$dir/initdb.log" 2>&1 ||
    { cat "$dir/initdb.log" >&2; exit 1; }
  # Not an argument of the server, so that a test can change it.
  echo 'max_connections = 300' | unprivileged tee -a "$dir/data/postgresql.conf" >/dev/null
  # Single-user mode, because no server runs yet.
  echo 'create database baton' | unprivileged "$bin/postgres" --single -D "$dir/data" postgres >>"$dir/initdb.log" 2>&1
}

start() {
  local port
  running_server && return
  [ "$(id -u)" = 0 ] && chown postgres "$dir"
  port=$(settle_port "$dir" "${1:-}" 1)
  # On a small disk the WAL stays small.
  local disk=
  if [ -d "$dir/disk" ]; then disk='-c max_wal_size=64MB -c min_wal_size=32MB'; fi
  [ -s "$dir/data/PG_VERSION" ] || create
  # The socket goes into the directory: the packaged default may be missing or not writable.
  if ! unprivileged "$bin/pg_ctl" start -s -w -t 60 -D "$dir/data" -l "$dir/server.log" -o "-p $port -k '$dir' \
      -c listen_addresses=127.0.0.1 -c fsync=on -c synchronous_commit=on $disk -c shared_preload_libraries=pg_stat_statements"; then
    tail -n 15 "$dir/server.log" >&2
    exit 1
  fi
}

stop() { # MODE
  running_server || return 0
  unprivileged "$bin/pg_ctl" stop -s -w -t 60 -D "$dir/data" -m "$1"
}

# Freezes the server first, so that it starts no new backend while the others are being killed.
kill_server() {
  running_server || return 0
  local server child
  server=$(cat "$dir/server.pid")
  kill -STOP "$server"
  for child in $(cat "/proc/$server/task/$server/children"); do kill -KILL "$child" 2>/dev/null || true; done
  kill -KILL "$server"
  await_end "$dir/server.pid" 10
  # PostgreSQL takes a dead server that is not reaped yet for a live one, so its pid file must go.
  rm -f "$pid_file" "$dir"/.s.PGSQL.*
}

make_disk() { # MB
  mkdir "$dir/disk"
  mount -t tmpfs -o "size=${1}m" tmpfs "$dir/disk"
  # The server creates its own folder there; the link points to it.
  mkdir -m 700 "$dir/disk/data"
  chown -R postgres "$dir/disk"
  ln -s disk/data "$dir/data"
}

case $verb in
  start) start "${3:-}" ;;
  save) stop fast; rm -rf "$dir/saved"; cp -a "$dir/data" "$dir/saved"; start ;;
  restore) kill_server; rm -rf "$dir/data"; mv "$dir/saved" "$dir/data"; start ;;
  disk) make_disk "${3:?megabytes}" ;;
  stop) stop fast ;;
  kill) kill_server ;;
  end)
    kill_server
    if mountpoint -q "$dir/disk"; then umount -l "$dir/disk"; fi
    ;;
  restart) stop fast; start ;;
  env) echo "BATON_TEST_DATABASE=postgres://baton@127.0.0.1:$(cat "$dir/port")/baton" ;;
  *) echo "postgres.sh: unknown verb $verb" >&2; exit 2 ;;
esac
