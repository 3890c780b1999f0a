#!/usr/bin/env bash
# A private RabbitMQ with its management plugin, on loopback, without systemd, as root or as any user.
#
#   rabbitmq.sh start DIR [PORT]     start it unless it runs; keeps its ports across starts
#   rabbitmq.sh stop DIR             clean stop (takes several seconds because of the management plugin)
#   rabbitmq.sh kill DIR             SIGKILL; `start` restores the durable queues
#   rabbitmq.sh restart-empty DIR    SIGKILL, delete everything that was stored, start
#   rabbitmq.sh ctl DIR ARGS...      rabbitmqctl on this instance
#   rabbitmq.sh env DIR              print its addresses as shell assignments
#
# Ports: AMQP at PORT, management at PORT+1, Erlang distribution at PORT+2, port mapper (epmd) at PORT+3.
#
# The folder of a cluster node (cluster.sh) has two more files: `epmd-port`, the shared port mapper, which the node
# neither starts nor stops, and `more.conf`, additional settings.
set -euo pipefail
. "$(dirname "$0")/lib.sh"

verb=${1:?verb} dir=${2:?directory}
mkdir -p "$dir"
dir=$(cd "$dir" && pwd)

# The programs in /usr/sbin are wrappers that change to the user rabbitmq and drop the environment.
bin=/usr/lib/rabbitmq/bin

# Settings that the server and rabbitmqctl must share. A separate home gives the instance its own Erlang cookie.
settings() {
  port=$(cat "$dir/port")
  export HOME=$dir RABBITMQ_BASE=$dir
  export RABBITMQ_NODENAME=baton-test-$port@localhost
  export RABBITMQ_MNESIA_BASE=$dir/data RABBITMQ_LOG_BASE=$dir/log RABBITMQ_GENERATED_CONFIG_DIR=$dir/generated
  export RABBITMQ_CONFIG_FILE=$dir/rabbitmq.conf RABBITMQ_ADVANCED_CONFIG_FILE=$dir/none RABBITMQ_CONF_ENV_FILE=$dir/none
  export RABBITMQ_ENABLED_PLUGINS_FILE=$dir/plugins RABBITMQ_PID_FILE=$dir/server.pid
  export RABBITMQ_DIST_PORT=$((port + 2)) ERL_EPMD_ADDRESS=127.0.0.1
  export ERL_EPMD_PORT=$(cat "$dir/epmd-port" 2>/dev/null || echo $((port + 3)))
  # Few schedulers that do not spin: several instances share a small machine with the tests.
  export RABBITMQ_SERVER_ADDITIONAL_ERL_ARGS="+S 2:2 +sbwt none +sbwtdcpu none +sbwtdio none -kernel inet_dist_use_interface {127,0,0,1}"
  export RABBITMQ_CTL_ERL_ARGS="+S 1:1 +sbwt none"
}

configure() {
  mkdir -p "$dir"/{data,log,generated}
  echo '[rabbitmq_management].' >"$dir/plugins"
  cat >"$dir/rabbitmq.conf" <<CONF
listeners.tcp.1 = 127.0.0.1:$port
management.tcp.ip = 127.0.0.1
management.tcp.port = $((port + 1))
# Tests read counters (publish, redeliver) from these statistics; rates and histories are not needed.
collect_statistics_interval = 1000
management.rates_mode = basic
disk_free_limit.absolute = 50MB
# The log of quorum queues may take 512 MB, and twice that while it is written to the queues' own files.
vm_memory_high_watermark.absolute = 2GB
CONF
  [ ! -e "$dir/more.conf" ] || cat "$dir/more.conf" >>"$dir/rabbitmq.conf"
  [ -s "$dir/.erlang.cookie" ] || new_cookie "$dir/.erlang.cookie"
}

# An open port may still refuse: the management plugin listens before it can answer.
answers() { curl -sf -o "$dir/overview" -u guest:guest "http://127.0.0.1:$1/api/overview"; }

start() {
  running "$dir/group.pid" && return
  settle_port "$dir" "${1:-}" 4 >/dev/null
  settings
  configure
  [ -s "$dir/epmd-port" ] || start_epmd "$dir" "$ERL_EPMD_PORT"
  rm -f "$dir/server.pid"
  setsid "$bin/rabbitmq-server" </dev/null >"$dir/log/server.out" 2>&1 &
  echo $! >"$dir/group.pid"
  local tries=1200
  until listening "$port" && answers $((port + 1)); do
    if ! running "$dir/group.pid" || [ $((tries -= 1)) -lt 0 ]; then
      echo "rabbitmq.sh: no RabbitMQ on port $port:" >&2
      tail -n 30 "$dir/log/server.out" >&2
      kill_all
      exit 1
    fi
    sleep 0.05
  done
}

# The group is the start script and the server below it; a clean stop signals the server's own pid.
stop_server() {
  running "$dir/group.pid" && [ -s "$dir/server.pid" ] && kill -TERM "$(cat "$dir/server.pid")" 2>/dev/null
  await_end "$dir/group.pid" 30
  rm -f "$dir/group.pid" "$dir/server.pid"
}

kill_server() {
  running "$dir/group.pid" && kill -KILL -- "-$(cat "$dir/group.pid")" 2>/dev/null
  await_end "$dir/server.pid" 10
  rm -f "$dir/group.pid" "$dir/server.pid"
}

kill_all() { kill_server || true; stop_epmd "$dir" || true; }

case $verb in
  start) start "${3:-}" ;;
  stop) stop_server || true; stop_epmd "$dir" || true ;;
  kill) kill_all ;;
  restart-empty) kill_server || true; rm -rf "$dir/data"; start ;;
  ctl) settings; shift 2; exec "$bin/rabbitmqctl" "$@" ;;
  env)
    settings
    echo "BATON_TEST_AMQP=amqp://guest:guest@127.0.0.1:$port"
    echo "BATON_TEST_MANAGEMENT=http://127.0.0.1:$((port + 1))"
    ;;
  *) echo "rabbitmq.sh: unknown verb $verb" >&2; exit 2 ;;
esac
