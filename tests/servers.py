"""Database servers for tests, from installed binaries, in folders of their own."""

from __future__ import annotations

import getpass
import shutil
import socket
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import count
from pathlib import Path

import psycopg
import pytest
from sqlalchemy.engine import make_url

_SCRIPT = Path(__file__).parent.parent / "storage" / "postgres.sh"


class Postgres:
    """A running server; `new_database()` is the URL of an empty database on it."""

    def __init__(self, folder: Path, url: str) -> None:
        self._folder = folder
        self._url = make_url(url)
        self._numbers = count(1)

    def new_database(self) -> str:
        name = f"test{next(self._numbers)}"
        plain = self._url.set(drivername="postgresql").render_as_string(hide_password=False)
        with psycopg.connect(plain, autocommit=True) as connection:
            connection.execute(f"CREATE DATABASE {name}")  # type: ignore[arg-type]
        return self._url.set(database=name).render_as_string(hide_password=False)

    def restart(self) -> None:
        """Stop it as a crash would, and start it again."""
        _run("restart", self._folder)

    def stop(self) -> None:
        _run("stop", self._folder)

    def start(self) -> None:
        _run("start", self._folder)


@contextmanager
def postgres_server() -> Iterator[Postgres]:
    # pytest's own folders are closed to the user that the server runs as.
    folder = Path(tempfile.mkdtemp(prefix="accelsearch-pg-"))
    folder.chmod(0o755)
    try:
        started = _run("start", folder)
        if started.returncode == 2:
            pytest.skip(started.stderr.strip())
        assert started.returncode == 0, started.stderr
        try:
            yield Postgres(folder, started.stdout.strip())
        finally:
            _run("stop", folder)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _run(action: str, folder: Path) -> subprocess.CompletedProcess[str]:
    command = [str(_SCRIPT), action, str(folder)]
    # Not a pipe for stderr: the server would keep it open.
    with tempfile.TemporaryFile("w+") as errors:
        done = subprocess.run(
            command, stdout=subprocess.PIPE, stderr=errors, text=True, timeout=120
        )
        errors.seek(0)
        done.stderr = errors.read()
    return done


class MySql:
    """A running server; `new_database()` is the URL of an empty database on it."""

    def __init__(self, port: int) -> None:
        self._port = port
        self._numbers = count(1)

    def new_database(self) -> str:
        import pymysql

        name = f"test{next(self._numbers)}"
        with (
            pymysql.connect(host="127.0.0.1", port=self._port, user="root") as connection,
            connection.cursor() as cursor,
        ):
            cursor.execute(f"CREATE DATABASE {name}")
            cursor.execute(f"CREATE USER {name} IDENTIFIED BY 'secret'")
            cursor.execute(f"GRANT ALL ON {name}.* TO {name}")
        return f"mysql://{name}:secret@127.0.0.1:{self._port}/{name}"


@contextmanager
def mysql_server() -> Iterator[MySql]:
    server = shutil.which("mariadbd") or shutil.which("mariadbd", path="/usr/sbin")
    make = shutil.which("mariadb-install-db")
    if server is None or make is None:
        pytest.skip("MariaDB is not installed; on Debian: apt-get install mariadb-server")
    folder = Path(tempfile.mkdtemp(prefix="accelsearch-mysql-"))
    user = getpass.getuser()
    data = ["--no-defaults", f"--datadir={folder}/data", f"--user={user}"]
    made = [make, *data, "--auth-root-authentication-method=normal", "--skip-test-db"]
    subprocess.run(made, check=True, capture_output=True, timeout=120)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    listens = [f"--port={port}", "--bind-address=127.0.0.1", f"--socket={folder}/socket"]
    with (folder / "log").open("w") as log:
        process = subprocess.Popen([server, *data, *listens], stdout=log, stderr=log)
    try:
        deadline = time.monotonic() + 60
        while "ready for connections" not in (folder / "log").read_text():
            assert process.poll() is None, (folder / "log").read_text()
            assert time.monotonic() < deadline, (folder / "log").read_text()
            time.sleep(0.1)
        yield MySql(port)
    finally:
        process.terminate()
        process.wait(60)
        shutil.rmtree(folder, ignore_errors=True)
