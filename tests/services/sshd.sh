#!/usr/bin/env bash
# A private OpenSSH server on loopback that runs as the current user. Only the keys in its folder can log in.
#
#   sshd.sh start DIR [PORT]   start it unless it runs; keeps its keys and its port across starts
#   sshd.sh stop DIR           accept no new connections; open ones stay
#   sshd.sh kill DIR           SIGKILL the server, its connections and their commands; not those left by `stop`
#   sshd.sh disk DIR MB        make DIR/disk a disk in memory of this size (needs root)
#   sshd.sh end DIR            SIGKILL, and remove that disk
#
# SSHD_EXTRA holds further lines of its configuration, separated by semicolons; they override the lines below.
# The folder has host_ed25519 and host_ecdsa (host keys), id_ed25519, id_rsa and id_locked (user keys; the passphrase of
# id_locked is "sesame"), id_stranger (a key without access), known_hosts, ssh_config (with the host `login`) and
# sshd.log.
set -euo pipefail
. "$(dirname "$0")/lib.sh"

verb=${1:?verb} dir=${2:?directory}
mkdir -p "$dir"
dir=$(cd "$dir" && pwd)
pid_file=$dir/sshd.pid

new_key() { # FILE TYPE PASSPHRASE [OPTIONS]
  [ -s "$dir/$1" ] || ssh-keygen -q -t "$2" -N "$3" -C "$1" -f "$dir/$1" "${@:4}"
}

create() {
  chmod 700 "$dir"
  new_key host_ed25519 ed25519 ''
  new_key host_ecdsa ecdsa ''
  new_key id_ed25519 ed25519 ''
  new_key id_rsa rsa '' -b 2048
  new_key id_locked ed25519 sesame
  new_key id_stranger ed25519 ''
  [ -s "$dir/authorized_keys" ] || cat "$dir"/id_{ed25519,rsa,locked}.pub >"$dir/authorized_keys"
}

configure() { # PORT
  # The first line of a name wins. SHLVL keeps bash from reading the user's .bashrc, which may be slow.
  {
    tr ';' '\n' <<<"${SSHD_EXTRA:-}"
    cat <<END
ListenAddress 127.0.0.1:$1
HostKey $dir/host_ed25519
HostKey $dir/host_ecdsa
PidFile $pid_file
AuthorizedKeysFile $dir/authorized_keys
PasswordAuthentication no
KbdInteractiveAuthentication no
PermitRootLogin prohibit-password
UsePAM no
StrictModes no
MaxSessions 50
LogLevel VERBOSE
PrintMotd no
PrintLastLog no
SetEnv SHLVL=5
END
  } >"$dir/sshd_config"
  [ -s "$dir/known_hosts" ] || echo "[127.0.0.1]:$1 $(cut -d' ' -f1,2 "$dir/host_ed25519.pub")" >"$dir/known_hosts"
  cat >"$dir/ssh_config" <<END
Host login
  HostName 127.0.0.1
  Port $1
  User $(id -un)
  IdentityFile $dir/id_ed25519
  IdentitiesOnly yes
  UserKnownHostsFile $dir/known_hosts
  GlobalKnownHostsFile none
  StrictHostKeyChecking yes
  BatchMode yes
END
}

start() {
  local port
  running "$pid_file" && return
  create
  port=$(settle_port "$dir" "${1:-}" 1)
  configure "$port"
  # The init script creates it otherwise.
  [ "$(id -u)" != 0 ] || mkdir -p -m 0755 /run/sshd
  # sshd re-executes itself by its absolute path.
  /usr/sbin/sshd -f "$dir/sshd_config" -E "$dir/sshd.log"
  # sshd writes its pid when it listens.
  for _ in $(seq 200); do
    running "$pid_file" && return
    sleep 0.05
  done
  tail -n 15 "$dir/sshd.log" >&2
  exit 1
}

# Kills a process before its children, so that a connection dies before its commands and does not report their end.
tree() {
  local child
  echo "$1"
  for child in $(cat "/proc/$1/task/$1/children" 2>/dev/null); do tree "$child"; done
}

kill_server() {
  local pid victims=
  running "$pid_file" && victims=$(tree "$(cat "$pid_file")")
  for pid in $victims; do kill -KILL "$pid" 2>/dev/null || true; done
  await_end "$pid_file" 5
  rm -f "$pid_file"
}

case $verb in
  start) start "${3:-}" ;;
  stop)
    running "$pid_file" && kill "$(cat "$pid_file")"
    await_end "$pid_file" 5
    ;;
  kill) kill_server ;;
  disk) mkdir "$dir/disk" && mount -t tmpfs -o "size=${3:?megabytes}m" tmpfs "$dir/disk" ;;
  end)
    kill_server
    if mountpoint -q "$dir/disk"; then umount -l "$dir/disk"; fi
    ;;
  *) echo "sshd.sh: unknown verb $verb" >&2; exit 2 ;;
esac
