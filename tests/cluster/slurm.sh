#!/usr/bin/env bash
# A real SLURM on one machine, for tests: a controller (head) and six nodes (node1 to node6).
#
#   CLUSTER=FOLDER tests/cluster/slurm.sh up            install what is missing, start everything
#   CLUSTER=FOLDER tests/cluster/slurm.sh in HOST CMD   run a command on a host
#   CLUSTER=FOLDER tests/cluster/slurm.sh kill HOST     the host's power fails: no process is left,
#                                                       its network is dead
#   CLUSTER=FOLDER tests/cluster/slurm.sh start HOST    the host comes back
#   CLUSTER=FOLDER tests/cluster/slurm.sh down          end all of it, remove what `up` made
#                  tests/cluster/slurm.sh install       install what is missing, start nothing
#
# Needs root. Each host is a network namespace with a name, an address and an /etc/hosts of its own;
# a bridge between them lies in the head's namespace, so nothing leaves the machine. Everything
# else (configuration, keys, logs, state) is in FOLDER; nothing is written to /etc.
set -euo pipefail

fail() { echo "error: $*" >&2; exit 2; }
[ "$(id -u)" = 0 ] || fail "network namespaces need root; run this as root"
[ "${1:-}" != install ] || { CLUSTER=$(mktemp -d) && mkdir "$CLUSTER/log"; }
W=${CLUSTER:?set CLUSTER to the folder that holds the state of the cluster}
export SLURM_CONF=$W/etc/slurm.conf
nodes=(node1 node2 node3 node4 node5 node6)
replace=
# Several clusters may be up at a time: their namespaces have different names.
tag=mlra-$(printf %s "$W" | cksum | cut -d ' ' -f 1)

inside() { # HOST CMD...
  # Not `ip netns exec`: it mounts a fresh /sys without cgroups, which slurmd insists on.
  local host=$1
  shift
  # shellcheck disable=SC2016
  ${replace:+exec} nsenter --net=/run/netns/"$tag-$host" unshare --uts --mount --propagation private bash -c '
    mount --bind "$0/hosts/$1" /etc/hosts
    mount --bind "$0/disk/$1" "$0/local"
    hostname "$1"
    shift
    exec "$@"' "$W" "$host" "$@"
}

install_packages() {
  local missing=()
  command -v slurmctld >/dev/null && command -v slurmd >/dev/null || missing+=(slurmctld slurmd)
  command -v srun >/dev/null || missing+=(slurm-client)
  command -v munged >/dev/null || missing+=(munge)
  command -v ip >/dev/null || missing+=(iproute2)
  [ "${#missing[@]}" -gt 0 ] || return 0
  command -v apt-get >/dev/null || fail "there is no apt-get; install ${missing[*]} first"
  # No service may start by being installed: the tests start their own.
  local policy=/usr/sbin/policy-rc.d own=no done=yes
  [ -e "$policy" ] || { printf '#!/bin/sh\nexit 101\n' >"$policy"; chmod +x "$policy"; own=yes; }
  {
    apt-get update &&
    DEBIAN_FRONTEND=noninteractive apt-get install -y --no-install-recommends "${missing[@]}"
  } >"$W/log/apt.log" 2>&1 || done=no
  [ "$own" = no ] || rm "$policy"
  [ "$done" = yes ] || fail "apt-get could not install ${missing[*]}: $(tail -n 5 "$W/log/apt.log")"
}

network() {
  local host i=10
  for host in head "${nodes[@]}"; do
    ip netns add "$tag-$host"
    ip -n "$tag-$host" link set lo up
    mkdir -p "$W/hosts" "$W/disk/$host" "$W/local"
  done
  ip -n "$tag-head" link add bridge0 type bridge
  ip -n "$tag-head" addr add 10.77.0.1/24 dev bridge0
  ip -n "$tag-head" link set bridge0 up
  for host in "${nodes[@]}"; do
    i=$((i + 1))
    ip -n "$tag-head" link add "to-$host" type veth peer name eth0 netns "$tag-$host"
    ip -n "$tag-head" link set "to-$host" master bridge0 up
    ip -n "$tag-$host" addr add "10.77.0.$i/24" dev eth0
    ip -n "$tag-$host" link set eth0 up
    # Slow, so that steps of a run on several hosts take time and no CPU's, which other cases need.
    tc -n "$tag-$host" qdisc add dev eth0 root tbf rate 10mbit burst 64kb limit 4mb 2>/dev/null || true
  done
  for host in head "${nodes[@]}"; do
    {
      echo "127.0.0.1 localhost"
      # node3 and node4 are as Debian installs a host: its own name is a loopback address.
      case $host in node[34]) echo "127.0.1.1 $host" ;; esac
      printf '10.77.0.%s\n' "1 head" "11 node1" "12 node2" "13 node3" "14 node4" "15 node5" "16 node6"
    } | awk -v own="$host" '!(($2 == own) && seen[$2]++)' >"$W/hosts/$host"
  done
}

configure() {
  cat >"$SLURM_CONF" <<END
ClusterName=mlra
SlurmctldHost=head
AuthType=auth/munge
# A requeued job may start again once the credentials of its last start have expired.
AuthInfo=socket=$W/munge/socket,cred_expire=10
SlurmUser=root
SlurmdUser=root
SlurmctldPidFile=$W/state/slurmctld.pid
SlurmdPidFile=$W/spool/%n.pid
SlurmctldLogFile=$W/log/slurmctld.log
SlurmdLogFile=$W/log/slurmd.%n.log
StateSaveLocation=$W/state
SlurmdSpoolDir=$W/spool/%n
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
GresTypes=gpu
ReturnToService=2
MpiDefault=none
KillWait=30
SlurmdTimeout=20
InactiveLimit=0
SchedulerParameters=sched_interval=2,batch_sched_delay=1
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
NodeName=node[1-6] NodeAddr=10.77.0.[11-16] CPUs=2 Gres=gpu:8 State=UNKNOWN
PartitionName=all Nodes=node[1-6] Default=YES MaxTime=INFINITE State=UP PriorityTier=1 GraceTime=25
PartitionName=urgent Nodes=node[1-6] MaxTime=INFINITE State=UP PriorityTier=2
END
  # GPUs are empty files: nothing here restricts devices.
  local gpu
  for gpu in 0 1 2 3 4 5 6 7; do : >"$W/gpu/gpu$gpu"; done
  echo "NodeName=node[1-6] Name=gpu File=$W/gpu/gpu[0-7]" >"$W/etc/gres.conf"
  printf 'CgroupAutomount=no\nConstrainCores=no\n' >"$W/etc/cgroup.conf"
}

start_node() {
  mkdir -p "$W/spool/$1"
  ip -n "$tag-$1" link set eth0 up
  inside "$1" slurmd -N "$1" -f "$SLURM_CONF"
}

up() {
  [ ! -e "$W/etc" ] || fail "$W holds a cluster already; end it first (down)"
  mkdir -p "$W"/{etc,log,state,spool,gpu,munge}
  chmod 755 "$W" "$W/munge"
  install_packages
  network
  configure
  dd if=/dev/urandom of="$W/munge/key" bs=128 count=1 status=none
  chmod 400 "$W/munge/key"
  munged --force --key-file="$W/munge/key" --socket="$W/munge/socket" \
    --pid-file="$W/munge/pid" --log-file="$W/log/munged.log" --seed-file="$W/munge/seed"
  inside head slurmctld -f "$SLURM_CONF"
  local node tries=0
  for node in "${nodes[@]}"; do start_node "$node"; done
  until [ "$(inside head sinfo -h -N -p all -t idle -o %N 2>/dev/null | wc -l)" = "${#nodes[@]}" ]; do
    tries=$((tries + 1))
    [ "$tries" -le 60 ] || fail "the nodes did not come up; see $W/log"
    sleep 0.5
  done
}

kill_host() { # every process of the host at once, and its network
  ip -n "$tag-$1" link set eth0 down 2>/dev/null || true
  local pids
  pids=$(ip netns pids "$tag-$1")
  # shellcheck disable=SC2086
  [ -z "$pids" ] || kill -KILL $pids 2>/dev/null || true
}

down() {
  local host
  for host in "${nodes[@]}" head; do
    [ ! -e "/run/netns/$tag-$host" ] || { kill_host "$host"; ip netns del "$tag-$host"; }
  done
  if [ -f "$W/munge/pid" ]; then kill "$(cat "$W/munge/pid")" 2>/dev/null || true; fi
  rm -rf "${W:?}"/{etc,state,spool,gpu,munge,hosts,disk,local}
}

case ${1:-} in
  up) up ;;
  install) install_packages; rm -r "$W" ;;
  down) down ;;
  # In this shell's place, so that a signal to it reaches the command.
  in) shift; replace=yes; inside "$@" ;;
  kill) kill_host "${2:?kill HOST}" ;;
  start) start_node "${2:?start HOST}" ;;
  *) sed -n 4,10p "$0" >&2; exit 2 ;;
esac
