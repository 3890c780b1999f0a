#!/usr/bin/env bash
# A private cluster of three RabbitMQ nodes on loopback. A node is an instance of rabbitmq.sh in DIR/1, DIR/2 or DIR/3,
# where it can be killed, started and queried. The nodes share a cookie and a port mapper.
#
#   cluster.sh start DIR          start the nodes that are not running
#   cluster.sh kill DIR           SIGKILL all nodes
#   cluster.sh split DIR NODE     isolate a node from the others until it restarts; clients still reach it
#   cluster.sh env DIR            print the addresses as shell assignments, those of the nodes separated by commas
set -euo pipefail
. "$(dirname "$0")/lib.sh"

verb=${1:?verb} dir=${2:?directory} which=${3:-}
mkdir -p "$dir"
dir=$(cd "$dir" && pwd)
here=$(cd "$(dirname "$0")" && pwd)

node() { "$here/rabbitmq.sh" "$1" "$dir/$2" "${@:3}"; }
node_name() { echo "baton-test-$(cat "$dir/$1/port")@localhost"; }

prepare() {
  local port node
  port=$(settle_port "$dir" "" 12)
  [ -s "$dir/cookie" ] || new_cookie "$dir/cookie"
  for node in 1 2 3; do
    mkdir -p "$dir/$node"
    echo $((port + 4 * (node - 1))) >"$dir/$node/port"
    echo $((port + 3)) >"$dir/$node/epmd-port"
    cp -p "$dir/cookie" "$dir/$node/.erlang.cookie"
    # A split must last until it is healed, so nodes do not act on it themselves.
    echo "cluster_partition_handling = ignore" >"$dir/$node/more.conf"
  done
  for node in 2 3; do
    echo "cluster_formation.classic_config.nodes.1 = $(node_name 1)" >>"$dir/$node/more.conf"
  done
}

start() {
  local pid pids=()
  [ -s "$dir/port" ] || prepare
  start_epmd "$dir" "$(cat "$dir/1/epmd-port")"
  # The others join the first.
  node start 1
  for number in 2 3; do node start $number & pids+=($!); done
  for pid in "${pids[@]}"; do wait "$pid"; done
}

# With a new cookie the node neither finds its former peers nor accepts them; rabbitmqctl still has the old one.
split() { # NODE
  local peer terms=
  for peer in 1 2 3; do
    [ "$peer" = "$1" ] && continue
    terms+="erlang:set_cookie('$(node_name $peer)', apart), erlang:disconnect_node('$(node_name $peer)'), "
  done
  node ctl "$1" eval "${terms}nodes()."
}

kill_all() {
  for number in 1 2 3; do [ ! -d "$dir/$number" ] || node kill $number; done
  stop_epmd "$dir" || true
}

case $verb in
  start) start ;;
  kill) kill_all ;;
  split) split "$which" ;;
  env)
    urls= apis=
    for number in 1 2 3; do
      port=$(cat "$dir/$number/port")
      urls+=${urls:+,}amqp://guest:guest@127.0.0.1:$port
      apis+=${apis:+,}http://127.0.0.1:$((port + 1))
    done
    echo "BATON_TEST_AMQP=$urls"
    echo "BATON_TEST_MANAGEMENT=$apis"
    ;;
  *) echo "cluster.sh: unknown verb $verb" >&2; exit 2 ;;
esac
