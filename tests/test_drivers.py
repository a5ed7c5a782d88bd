"""Drivers other than ours are told nothing that they do not know."""

from __future__ import annotations

import inspect
import sys
from types import ModuleType
from typing import Any

import pytest
import sqlalchemy

from accelsearch import completion
from accelsearch.drivers import DRIVERS, EXTRAS, LIMITS
from accelsearch.errors import StorageError
from accelsearch.storage import open_storage

URL = "postgresql+pg8000://user:s3cret@127.0.0.1:1/db"
ERRORS = (
    *("Warning", "InterfaceError", "DatabaseError", "DataError", "OperationalError"),
    *("IntegrityError", "InternalError", "ProgrammingError", "NotSupportedError"),
)


@pytest.fixture
def pg8000(monkeypatch: pytest.MonkeyPatch) -> Any:
    """A driver that is not ours, as far as it is asked to connect: `asked` is how often."""
    driver: Any = ModuleType("pg8000")
    driver.paramstyle, driver.__version__, driver.asked = "format", "1.31.0", 0
    driver.Error = type("Error", (Exception,), {})
    for name in ERRORS:
        setattr(driver, name, type(name, (driver.Error,), {}))

    def connect(
        user: str, host: str = "", database: str = "", port: int = 0, password: str = ""
    ) -> None:
        driver.asked += 1
        raise driver.InterfaceError("nobody answers")

    driver.connect, driver.native = connect, driver
    monkeypatch.setitem(sys.modules, "pg8000", driver)
    return driver


def test_a_driver_of_other_options_is_asked_without_ours(pg8000: Any) -> None:
    with pytest.raises(StorageError, match=r"reachable and writable.*nobody answers") as error:
        open_storage(URL)
    assert "s3cret" not in str(error.value)
    assert pg8000.asked


def test_completion_asks_such_a_driver_without_ours_too(pg8000: Any) -> None:
    with pytest.raises(sqlalchemy.exc.InterfaceError, match="nobody answers"):
        completion._studies(URL)
    assert pg8000.asked == 1


def test_completion_uses_the_drivers_that_a_search_does(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def refuse(url: Any, **options: Any) -> None:
        asked.append((url.drivername, options["connect_args"]))
        raise ConnectionError

    monkeypatch.setattr(sqlalchemy, "create_engine", refuse)
    for kind in ("postgresql", "mysql"):
        with pytest.raises(ConnectionError):
            completion._studies(f"{kind}://user@127.0.0.1:1/db")
    assert asked == [(driver, {"connect_timeout": 2}) for driver in DRIVERS.values()]


def test_our_drivers_have_limits_that_they_know() -> None:
    assert set(DRIVERS.values()) == set(EXTRAS) <= set(LIMITS)
    pymysql = pytest.importorskip("pymysql")
    known = inspect.signature(pymysql.connections.Connection.__init__).parameters
    assert LIMITS["mysql+pymysql"].keys() <= known.keys()
