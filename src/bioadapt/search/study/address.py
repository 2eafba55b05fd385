"""Addresses of storages: which kinds there are, and how one is shown without its password."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from sqlalchemy.engine import URL

# Databases, and the driver that is taken where the address names none.
DRIVERS = {"postgresql": "psycopg", "mysql": "pymysql"}
KINDS = ("journal", "sqlite", "grpc", *DRIVERS)
ACCEPTED = (
    "PATH.journal or PATH.log, journal:PATH, sqlite:///PATH, postgresql://USER:PASSWORD@HOST/DATABASE, "
    "mysql://USER:PASSWORD@HOST/DATABASE, grpc://HOST:PORT"
)
_SECRET = re.compile(r"([^?&=]*(?:pass|pwd|secret|token|key)[^?&=]*)=[^&]*", re.IGNORECASE)
_STARS = "***"


def parsed(address: str) -> URL:
    """The parts of an address.

    Raises:
        ValueError: it is none, or its password holds an ``@`` of its own.
    """
    from sqlalchemy.engine import make_url
    from sqlalchemy.exc import ArgumentError

    try:
        url = make_url(address)
    except (ArgumentError, ValueError):
        raise ValueError(f"storage {hidden(address)!r}: not an address; accepted: {ACCEPTED}") from None
    if address.count("@") - sum(str(value).count("@") for value in url.query.values()) > 1:
        raise ValueError(f"storage {hidden(address)!r}: it has a second @; within a password, @ is to be written %40")
    return url


def hidden(address: str) -> str:
    """An address as it may be shown: without its password, be it before the host or among the settings.

    SQLAlchemy takes the address apart and hides the password before the host; the settings after the question mark it
    would show. Of an address with a second ``@``, which is to be written ``%40``, nobody knows where its password ends:
    only its kind is shown.
    """
    kind, _, rest = address.partition(":")
    if len(kind) < 2 or kind == "journal" or not ("@" in rest or "?" in rest):
        return address  # there is no login in it
    if rest.count("@") > 1:
        return f"{kind}://{_STARS}"
    from sqlalchemy.engine import make_url
    from sqlalchemy.exc import ArgumentError

    try:
        shown = make_url(address).render_as_string(hide_password=True)
    except (ArgumentError, ValueError):  # a port that is no number, for one
        login, at, place = rest.removeprefix("//").rpartition("@")
        shown = f"{kind}://{login.partition(':')[0]}{':' + _STARS if ':' in login else ''}{at}{place}"
    return _SECRET.sub(rf"\1={_STARS}", shown)
