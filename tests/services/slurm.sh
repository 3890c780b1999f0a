#!/usr/bin/env bash
# A private Slurm on loopback: controller, nodes on this machine, and its own authentication daemon. No accounting.
#
#   slurm.sh start DIR              start it unless it runs; SLURM_NODES (1) nodes of SLURM_CPUS (4) cores each,
#                                   which may exceed the cores of this machine
#   slurm.sh stop DIR               cancel all jobs, then stop the daemons
#   slurm.sh stop-controller DIR    clean stop: a killed controller forgets jobs that it has just accepted
#   slurm.sh start-controller DIR   start it with the jobs that it had
#   slurm.sh env DIR                print SLURM_CONF as a shell assignment
set -euo pipefail
. "$(dirname "$0")/lib.sh"

verb=${1:?verb} dir=${2:?directory}
mkdir -p "$dir"
dir=$(cd "$dir" && pwd)
nodes=${SLURM_NODES:-1} cpus=${SLURM_CPUS:-4}
export SLURM_CONF=$dir/slurm.conf

daemon() { # NAME COMMAND...
  local name=$1
  shift
  running "$dir/$name.pid" && return
  setsid "$@" </dev/null >"$dir/$name.out" 2>&1 &
  echo $! >"$dir/$name.pid"
}

end() { # NAME
  running "$dir/$1.pid" && kill "$(cat "$dir/$1.pid")" 2>/dev/null
  await_end "$dir/$1.pid" 10
  rm -f "$dir/$1.pid"
}

await_port() { # PORT NAME
  local tries=200
  until listening "$1"; do
    if [ $((tries -= 1)) -lt 0 ]; then
      tail -n 15 "$dir/$2".{out,log} >&2
      exit 1
    fi
    sleep 0.05
  done
}

configure() { # PORT
  local me host
  me=$(id -un) host=$(hostname -s)
  (umask 077 && head -c 1024 /dev/urandom >"$dir/munge.key")
  mkdir -p "$dir"/{munge,state,spool}
  chmod 755 "$dir" "$dir/munge"
  cat >"$SLURM_CONF" <<CONF
ClusterName=baton
SlurmctldHost=$host(127.0.0.1)
SlurmUser=$me
SlurmdUser=$me
SlurmctldPort=$1
AuthType=auth/munge
AuthInfo=socket=$dir/munge/socket
CommunicationParameters=NoInAddrAny,NoCtldInAddrAny
StateSaveLocation=$dir/state
SlurmdSpoolDir=$dir/spool/%n
SlurmctldPidFile=$dir/controller.own
SlurmdPidFile=$dir/%n.own
SlurmctldLogFile=$dir/controller.log
SlurmdLogFile=$dir/%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
ReturnToService=2
MpiDefault=none
SchedulerParameters=sched_interval=2,batch_sched_delay=0,bf_interval=2
MaxJobCount=20000
MinJobAge=${SLURM_MIN_JOB_AGE:-300}
KillWait=3
SlurmctldTimeout=30
SlurmdTimeout=300
SlurmdParameters=config_overrides
NodeName=n[1-$nodes] NodeHostname=$host NodeAddr=127.0.0.1 Port=[$(($1 + 1))-$(($1 + nodes))] CPUs=$cpus RealMemory=2000
PartitionName=all Nodes=ALL Default=YES MaxTime=INFINITE DefMemPerCPU=1 State=UP
CONF
}

start_controller() {
  daemon controller slurmctld -D -i -f "$SLURM_CONF"
  await_port "$(cat "$dir/port")" controller
}

start() {
  local port node
  port=$(settle_port "$dir" '' $((nodes + 1)))
  [ -s "$SLURM_CONF" ] || configure "$port"
  # --force: munged objects to parent folders that are open to all.
  daemon munged munged -F --force --key-file="$dir/munge.key" --socket="$dir/munge/socket" \
    --pid-file="$dir/munge/pid" --log-file="$dir/munge/log" --seed-file="$dir/munge/seed"
  local tries=100
  until [ -S "$dir/munge/socket" ]; do
    [ $((tries -= 1)) -ge 0 ] || { cat "$dir/munged.out" >&2; exit 1; }
    sleep 0.05
  done
  start_controller
  for node in $(seq 1 "$nodes"); do daemon "n$node" slurmd -D -f "$SLURM_CONF" -N "n$node"; done
  tries=300
  until [ "$(sinfo -h -N -o %T 2>/dev/null | grep -cE '^(idle|mixed|allocated)$')" -ge "$nodes" ]; do
    [ $((tries -= 1)) -ge 0 ] || { sinfo -N -l >&2; exit 1; }
    sleep 0.1
  done
}

case $verb in
  start) start ;;
  stop)
    if running "$dir/controller.pid"; then
      timeout 10 squeue -h -o %A | xargs -r timeout 10 scancel 2>/dev/null || true
      for _ in $(seq 1 100); do
        [ -n "$(timeout 5 squeue -h -o %A 2>/dev/null)" ] || break
        sleep 0.1
      done
    fi
    for pid in "$dir"/n*.pid "$dir/controller.pid" "$dir/munged.pid"; do
      [ -e "$pid" ] && end "$(basename "$pid" .pid)"
    done
    ;;
  stop-controller) end controller ;;
  start-controller) start_controller ;;
  env) echo "SLURM_CONF=$SLURM_CONF" ;;
  *)
    echo "slurm.sh: unknown verb $verb" >&2
    exit 2
    ;;
esac
