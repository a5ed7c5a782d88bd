#!/usr/bin/env bash
# A PostgreSQL server of one's own, from the binaries installed on this machine.
#
#     storage/postgres.sh start [FOLDER]    makes it if there is none, and prints its URL
#     storage/postgres.sh restart [FOLDER]  stops it at once, as a crash would, and starts it again
#     storage/postgres.sh stop [FOLDER]     its data stay in FOLDER, storage/pg by default
#
# It listens on this machine alone, on a port that was free, and asks for a password of its own.
# POSTGRES_BIN names the folder of the binaries where they are not in one of the usual places.
set -euo pipefail

action=${1:-}
folder=$(realpath -m "${2:-$(dirname "$0")/pg}")

if [ -n "${POSTGRES_BIN:-}" ]; then
  binaries=$(realpath -m "$POSTGRES_BIN")
elif command -v pg_config >/dev/null && [ -x "$(pg_config --bindir)/initdb" ]; then
  binaries=$(pg_config --bindir)
else
  binaries=$(ls -d /usr/lib/postgresql/*/bin /opt/homebrew/opt/postgresql*/bin 2>/dev/null | sort -V | tail -n 1 || true)
fi
if [ ! -x "${binaries:-}/initdb" ]; then
  echo "PostgreSQL's initdb must be installed, found none; on Debian: apt-get install postgresql" >&2
  exit 2
fi

# PostgreSQL refuses to run as root.
if [ "$(id -u)" = 0 ]; then
  user=$(id -u postgres >/dev/null 2>&1 && echo postgres || echo nobody)
  if runuser -u "$user" -- true 2>/dev/null; then
    as() { (cd / && runuser -u "$user" -- "$@"); }
  else
    as() { (cd / && setpriv --reuid "$user" --regid "$(id -g "$user")" --clear-groups "$@"); }
  fi
else
  user=$(id -un)
  as() { "$@"; }
fi

control() { as "$binaries/pg_ctl" --pgdata "$folder/data" --log "$folder/log" --silent "$@" >&2; }

case "$action" in
  start)
    if [ ! -f "$folder/url" ]; then
      mkdir -p "$folder"
      port=$(python3 -c 'import socket; s = socket.socket(); s.bind(("127.0.0.1", 0)); print(s.getsockname()[1])')
      password=$(od -An -N16 -tx1 /dev/urandom | tr -d ' \n')
      (umask 077; printf '%s' "$password" >"$folder/password")
      chown -R "$user" "$folder"
      as "$binaries/initdb" --pgdata "$folder/data" --username accelsearch --encoding UTF8 --locale C \
        --auth scram-sha-256 --pwfile "$folder/password" >"$folder/initdb.log"
      cat >>"$folder/data/postgresql.conf" <<CONF
listen_addresses = '127.0.0.1'
port = $port
unix_socket_directories = ''
max_connections = 300
CONF
      (umask 077; echo "postgresql+psycopg://accelsearch:$password@127.0.0.1:$port/postgres" >"$folder/url")
    fi
    control status >/dev/null 2>&1 || control --wait start
    cat "$folder/url"
    ;;
  restart) control --wait --mode immediate restart ;;
  stop) control --wait --mode fast stop ;;
  *)
    sed -n '2,9s/^# \{0,1\}//p' "$0" >&2
    exit 2
    ;;
esac
