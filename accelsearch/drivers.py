"""The database drivers that are tested, and what they are told of servers that do not answer.

Nothing is imported here: a shell's completion has no time for it.
"""

from __future__ import annotations

from collections.abc import Mapping

__all__ = ["DRIVERS", "EXTRAS", "LIMITS"]

DRIVERS = {"postgresql": "postgresql+psycopg", "mysql": "mysql+pymysql"}
"""What is used where a URL names no driver, instead of SQLAlchemy's own choice."""
EXTRAS = {"postgresql+psycopg": "postgres", "mysql+pymysql": "mysql"}
"""What installs them."""

# A server that is cut off is noticed within a minute, not when TCP gives up after a quarter hour.
_POSTGRES = {
    "connect_timeout": 10,
    "keepalives_idle": 20,
    "keepalives_interval": 10,
    "keepalives_count": 3,
    "tcp_user_timeout": 60_000,  # ms
}
_MYSQL = {"connect_timeout": 10, "read_timeout": 60, "write_timeout": 60}
LIMITS: Mapping[str, Mapping[str, int]] = {
    "postgresql+psycopg": _POSTGRES,
    "postgresql+psycopg2": _POSTGRES,
    "mysql+pymysql": _MYSQL,
    "mysql+mysqldb": _MYSQL,
}
"""Options by driver; any other has names of its own for them, and refuses these."""
