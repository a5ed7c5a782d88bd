#!/usr/bin/env bash
# A Slurm cluster of this machine alone, for the tests marked `slurm`: one node on loopback.
#
#     tests/slurm/start.sh        as root, on Debian; installs slurm-wlm where it is missing
#     tests/slurm/start.sh stop
#
# It takes over /etc/slurm/slurm.conf: not for a machine that is part of a real cluster.
set -euo pipefail

[ "$(id -u)" = 0 ] || { echo "tests/slurm/start.sh must be run as root" >&2; exit 2; }
mark='# made by tests/slurm/start.sh'

stop() {
  for daemon in slurmd slurmctld; do
    [ -f "/run/accelsearch-$daemon.pid" ] && kill "$(cat "/run/accelsearch-$daemon.pid")" 2>/dev/null || true
  done
}

if [ "${1:-start}" = stop ]; then
  stop
  exit 0
fi

if [ -f /etc/slurm/slurm.conf ] && ! grep -q "^$mark" /etc/slurm/slurm.conf; then
  echo "/etc/slurm/slurm.conf must not be that of a real cluster; move it away first" >&2
  exit 2
fi
if ! command -v slurmctld >/dev/null || ! command -v munged >/dev/null; then
  apt-get update -qq
  DEBIAN_FRONTEND=noninteractive apt-get install -y -qq slurm-wlm munge
fi
if sinfo --noheader --format=%T 2>/dev/null | grep -qE 'idle|mixed|allocated'; then
  exit 0 # it runs
fi
stop

host=$(hostname -s)
mkdir -p /run/munge /var/lib/accelsearch-slurm/state /var/lib/accelsearch-slurm/spool /etc/slurm
chown munge: /run/munge
[ -f /etc/munge/munge.key ] || { head -c 1024 /dev/urandom >/etc/munge/munge.key; chown munge: /etc/munge/munge.key; chmod 400 /etc/munge/munge.key; }
munge --no-input >/dev/null 2>&1 || runuser -u munge -- munged

cat >/etc/slurm/slurm.conf <<CONF
$mark
ClusterName=accelsearch
SlurmctldHost=$host(127.0.0.1)
AuthType=auth/munge
# A requeued job waits until its credential has expired: 120 s by default.
AuthInfo=cred_expire=10
SlurmUser=root
SlurmdUser=root
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
StateSaveLocation=/var/lib/accelsearch-slurm/state
SlurmdSpoolDir=/var/lib/accelsearch-slurm/spool
SlurmctldPidFile=/run/accelsearch-slurmctld.pid
SlurmdPidFile=/run/accelsearch-slurmd.pid
SlurmctldLogFile=/var/log/accelsearch-slurmctld.log
SlurmdLogFile=/var/log/accelsearch-slurmd.log
ReturnToService=2
KillWait=10
MinJobAge=60
NodeName=$host NodeAddr=127.0.0.1 CPUs=$(nproc) State=UNKNOWN
PartitionName=local Nodes=$host Default=YES MaxTime=INFINITE State=UP
CONF

slurmctld -c
slurmd -c
for _ in $(seq 60); do
  state=$(sinfo --noheader --format=%T 2>/dev/null || true)
  case "$state" in
    idle | mixed | allocated) exit 0 ;;
    down* | drain*) scontrol update "nodename=$host" state=resume || true ;;
  esac
  sleep 0.5
done
echo "Slurm did not come up: ${state:-no answer}; see /var/log/accelsearch-slurm*.log" >&2
exit 1
