"""Where studies live: the storage behind an address."""

from __future__ import annotations

import warnings
from pathlib import Path

from optuna.exceptions import ExperimentalWarning
from optuna.storages import BaseStorage, GrpcStorageProxy, JournalStorage

from ..._extras import require
from ..._words import suggest
from .address import ACCEPTED, KINDS, hidden, parsed
from .database import EXTRA, make_room, open_database
from .journal import Journal
from .tickets import enqueue_again

# Seconds between two heartbeats, and after the last one until a trial counts as dead.
HEARTBEAT, GRACE = 30, 120
GRPC_PORT = 13000


def open_storage(url: str, *, heartbeat: int = HEARTBEAT, grace: int = GRACE, create: bool = True) -> BaseStorage:
    """The storage of studies behind an address. What does not exist yet is made: folder, file, tables.

    A journal file or SQLite serves the workers of one machine, PostgreSQL or MySQL any number of machines, and a gRPC
    proxy (Optuna's ``run_grpc_proxy_server``) relieves a database of many nodes.

    Args:
        url: ``PATH.journal``, ``PATH.log`` or ``journal:PATH``; ``sqlite:///PATH``; ``postgresql://…`` or
            ``mysql://…``, with the driver where another than psycopg or pymysql is meant; ``grpc://HOST:PORT``.
        heartbeat: databases only: seconds between the signs of life of a running trial.
        grace: databases only: seconds without one after which the trial fails and is enqueued again.
        create: whether a file that does not exist is made.

    Raises:
        FileNotFoundError: there is no such file, and none is to be made.
        ValueError: the address is of no known kind.
        ImportError: the driver is not installed; the message names the extra that brings it.
        ConnectionError: nothing answers at the address, or it refuses.
    """
    scheme, colon, rest = url.partition(":")
    if not colon or len(scheme) < 2:
        if Path(url).suffix not in (".log", ".journal"):
            raise ValueError(f"storage {url!r}: a file has to end in .journal or .log; accepted: {ACCEPTED}")
        return _journal(url, create)
    kind = scheme.partition("+")[0]
    if kind not in KINDS:
        raise ValueError(f"storage {hidden(url)!r}: unknown kind {kind!r}, {suggest(kind, KINDS)} In full: {ACCEPTED}")
    if kind == "journal":
        return _journal(rest.removeprefix("//"), create)
    if kind == "grpc":
        return _proxy(url)
    return open_database(url, heartbeat, grace, create, enqueue_again)


def _journal(path: str, create: bool) -> JournalStorage:
    if not path:
        raise ValueError(f"storage 'journal:': the path is missing; accepted: {ACCEPTED}")
    make_room(path, create)
    return JournalStorage(Journal(Path(path)))


def _proxy(url: str) -> GrpcStorageProxy:
    require("grpc", EXTRA)
    require("google.protobuf", EXTRA)
    parts = parsed(url)
    if not parts.host:
        raise ValueError(f"storage {hidden(url)!r}: the host is missing; accepted: grpc://HOST:PORT")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ExperimentalWarning)
        proxy = GrpcStorageProxy(host=parts.host, port=parts.port or GRPC_PORT)
    try:
        proxy.wait_server_ready(timeout=10)
    except ConnectionError:
        proxy.close()
        raise ConnectionError(f"storage {hidden(url)!r}: no proxy answers there") from None
    return proxy
