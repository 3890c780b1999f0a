# Functions that the service scripts share. Sourced, never run.

# Succeeds while the process that a pid file names exists. A zombie counts as gone: some init processes reap late.
running() {
  local pid state
  pid=$(cat "$1" 2>/dev/null) && [ -n "$pid" ] || return 1
  state=$(sed -n 's/^State:[[:space:]]*\(.\).*/\1/p' "/proc/$pid/status" 2>/dev/null) || return 1
  [ -n "$state" ] && [ "$state" != Z ]
}

# Waits until the process of a pid file is gone; after the limit (seconds), kills its whole process group.
await_end() {
  local file=$1 tries=$(($2 * 20))
  while running "$file"; do
    if [ $((tries -= 1)) -lt 0 ]; then
      kill -KILL -- "-$(cat "$file")" 2>/dev/null || kill -KILL "$(cat "$file")" 2>/dev/null || true
      tries=100
    fi
    sleep 0.05
  done
}

listening() { (exec 3<>"/dev/tcp/127.0.0.1/$1") 2>/dev/null; }

# Prints the first of N consecutive free ports, below the kernel's range for outgoing connections.
free_ports() {
  local count=$1 first port
  while :; do
    first=$((20000 + (((RANDOM << 15) | RANDOM) % (12000 / count)) * count))
    for ((port = first; port < first + count; port++)); do listening "$port" && continue 2; done
    echo "$first"
    return
  done
}

# Sets the port of an instance: the requested one, else the previous one, else N free ones.
settle_port() { # DIR PORT COUNT
  if [ -n "$2" ]; then echo "$2" >"$1/port"; elif [ ! -s "$1/port" ]; then free_ports "$3" >"$1/port"; fi
  cat "$1/port"
}

# Creates an Erlang cookie for one instance.
new_cookie() { # FILE
  od -An -N16 -tx8 /dev/urandom | tr -d ' \n' >"$1"
  chmod 400 "$1"
}

# Starts Erlang's port mapper in the foreground. Otherwise the server leaves a detached one running.
start_epmd() { # DIR PORT
  running "$1/epmd.pid" && return
  setsid epmd -address 127.0.0.1 -port "$2" </dev/null >"$1/epmd.out" 2>&1 &
  echo $! >"$1/epmd.pid"
}

stop_epmd() { # DIR
  running "$1/epmd.pid" && kill "$(cat "$1/epmd.pid")"
  await_end "$1/epmd.pid" 5
  rm -f "$1/epmd.pid"
}
