"""A PostgreSQL server for tests, from installed binaries, in a folder of its own."""

from __future__ import annotations

import shutil
import subprocess
import tempfile
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
