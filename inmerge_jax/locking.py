"""Exclusive folder lock: a file lock on local disks, a lease object in Cloud Storage."""

import contextlib
import errno
import json
import os
import platform
import sys
import threading
import time
import uuid
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from inmerge_jax.errors import UsageError

LOCK = ".lock"
"""Name of the locked file or lease; its existence alone does not mean that the folder is locked."""

LEASE_SECONDS = 60.0
"""Time after which a lease that is not renewed ends. Its holder renews it three times as often."""

_NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.ENOTSUP, errno.EINVAL)
_POLL_SECONDS = 0.1


class FolderInUseError(UsageError):
    """Another process holds the lock; the message names it."""


@contextlib.contextmanager
def lock(
    folder: os.PathLike[str] | str,
    say: Callable[[str], None] = warnings.warn,
    *,
    wait: bool = False,
) -> Iterator[None]:
    """Holds an exclusive lock on `folder` while the context is open.

    The system releases a local lock when the process ends. A lease on a gs:// folder is renewed by
    a thread. It ends after `LEASE_SECONDS` without renewal, or as soon as its process has ended if
    that ran on this host. A process that loses its lease ends at once with status 1, because
    another one may write the folder by then.

    Args:
      folder: local path, created if missing, or gs:// path.
      say: receives a warning if the file system has no locks; the context opens without one.
      wait: wait for another process instead of raising FolderInUseError.

    Raises:
      FolderInUseError: another process holds the lock.
      UsageError: a URL of another kind of storage, or no access to the bucket.
      OSError: the folder or the lock file cannot be written.
    """
    while True:
        try:
            release = _lease(folder) if _is_bucket(folder) else _lock_file(Path(folder), say)
            break
        except FolderInUseError:
            if not wait:
                raise
            time.sleep(_POLL_SECONDS)
    try:
        yield
    finally:
        release()


def require_free(folder: os.PathLike[str] | str) -> None:
    """Raises FolderInUseError if another process holds the lock; creates no file."""
    if _is_bucket(folder):
        with _storage_errors(folder):
            _Lease(folder).find_free_generation()
        return
    path = Path(folder) / LOCK
    if path.is_file():
        with contextlib.suppress(FileNotFoundError):
            if held := _acquire(path):
                held.release()


def _is_bucket(folder: os.PathLike[str] | str) -> bool:
    scheme, separator, _ = os.fspath(folder).partition("://")
    if separator and scheme != "gs":
        raise UsageError(f"{folder}: {scheme}:// has no locks; choose a local or a gs:// folder")
    return bool(separator)


def _lock_file(folder: Path, say: Callable[[str], None]) -> Callable[[], None]:
    """Locks a local folder; returns the function that releases it."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / LOCK
    held = _acquire(path, _write_holder)
    if held is None:
        say(f"the file system of {folder} has no locks: start no second process there")

    def release() -> None:
        if held is None or os.name == "posix":
            # Removed before the release, so that the next holder's file is not removed.
            path.unlink(missing_ok=True)
        if held is not None:
            held.release()

    return release


def _acquire(path: Path, then: Callable[[int], None] | None = None) -> Any:
    """Locks the file; returns the lock, or None if the file system has no locks."""
    from filelock import Timeout, UnixFileLock, WindowsFileLock

    native = WindowsFileLock if os.name == "nt" else UnixFileLock
    held = native(path, timeout=0, mode=0o666, fallback_to_soft=False, on_acquired=then)
    try:
        held.acquire()
    except Timeout as error:
        raise _in_use(path.parent, _read_holder(path)) from error
    except OSError as error:
        if error.errno not in _NO_LOCKS:
            raise
        return None
    return held


def _write_holder(handle: int) -> None:
    os.ftruncate(handle, 0)
    os.write(handle, _holder().encode())


def _read_holder(path: Path) -> str:
    try:
        return path.read_text(errors="replace")[:200] or "another process"
    except OSError:  # Released meanwhile; or on Windows, where a locked file cannot be read.
        return "another process"


def _holder() -> str:
    return f"process {os.getpid()} on {platform.node()}"


def _in_use(folder: os.PathLike[str] | str, holder: str, remedy: str = "") -> FolderInUseError:
    return FolderInUseError(
        f"{folder} is in use: {holder} writes there; wait until it has ended{remedy}, or choose "
        "another folder"
    )


def _lease(folder: os.PathLike[str] | str) -> Callable[[], None]:
    """Takes the lease of a gs:// folder; returns the function that releases it."""
    with _storage_errors(folder):
        lease = _Lease(folder)
        lease.acquire()
    thread = threading.Thread(target=lease.renew_until_released, daemon=True)
    thread.start()

    def release() -> None:
        lease.released.set()
        thread.join()
        with _storage_errors(folder):
            lease.delete()

    return release


class _Lease:
    """An object in a bucket that holds its owner and the time at which it ends.

    Every write names the generation that it replaces, so that of several processes one succeeds.
    """

    def __init__(self, folder: os.PathLike[str] | str) -> None:
        from google.cloud import storage

        self.folder = os.fspath(folder)
        bucket, _, name = self.folder.removeprefix("gs://").strip("/").partition("/")
        self.bucket = storage.Client(project=None).bucket(bucket)
        self.name = f"{name}/{LOCK}".lstrip("/")
        self.token = uuid.uuid4().hex
        self.released = threading.Event()
        self.generation = 0
        self.expires = 0.0

    def acquire(self) -> None:
        """Writes the lease; raises FolderInUseError if another process holds it."""
        while not self._write(self.find_free_generation()):
            pass  # Another process was faster; its lease is found next.

    def find_free_generation(self) -> int:
        """The generation that a new lease replaces, 0 if there is none."""
        found, generation = self._read()
        if found is None or found["expires"] < time.time() or _has_ended(found):
            return generation
        clock = time.strftime("%H:%M:%S", time.localtime(found["expires"]))
        raise _in_use(
            self.folder, found["holder"], f" or, if it was killed, until its lease ends at {clock}"
        )

    def renew_until_released(self) -> None:
        """Renews the lease; ends the process if that fails."""
        reason = "it was removed"
        while not self.released.wait(LEASE_SECONDS / 3):
            try:
                # One try at a time: the default is to retry for longer than the lease lasts.
                if self._write(self.generation, retry=None, timeout=LEASE_SECONDS / 6):
                    continue
                found, _ = self._read()
                if found is not None:
                    reason = f"{found['holder']} has taken it"
            except Exception as error:
                if time.time() < self.expires:
                    continue
                reason = f"{type(error).__name__}: {error}"
            print(
                f"error: the lease on {self.folder} is lost ({reason}); this process ends without "
                "writing there; the run can be resumed",
                file=sys.stderr,
                flush=True,
            )
            os._exit(1)

    def delete(self) -> None:
        """Deletes the lease, unless another one has replaced it."""
        from google.api_core.exceptions import NotFound, PreconditionFailed

        with contextlib.suppress(NotFound, PreconditionFailed):
            self.bucket.blob(self.name).delete(if_generation_match=self.generation)

    def _read(self) -> tuple[dict[str, Any] | None, int]:
        """The stored lease and its generation; None and 0 if there is none."""
        from google.api_core.exceptions import NotFound, PreconditionFailed

        while (blob := self.bucket.get_blob(self.name)) is not None:
            generation = blob.generation
            with contextlib.suppress(NotFound, PreconditionFailed):  # Replaced meanwhile.
                content = blob.download_as_bytes(if_generation_match=generation)
                return json.loads(content), generation
        return None, 0

    def _write(self, generation: int, **options: Any) -> bool:
        """Replaces the object of that generation; returns False if there is another one."""
        from google.api_core.exceptions import PreconditionFailed

        expires = time.time() + LEASE_SECONDS
        content = {"holder": _holder(), "token": self.token, "expires": expires, **_process()}
        blob = self.bucket.blob(self.name)
        try:
            blob.upload_from_string(json.dumps(content), if_generation_match=generation, **options)
        except PreconditionFailed:
            # A retry after a lost answer is refused too, with the own lease in place.
            found, current = self._read()
            if found is None or found["token"] != self.token:
                return False
            self.generation, self.expires = current, found["expires"]
        else:
            self.generation, self.expires = blob.generation, expires
        return True


def _process() -> dict[str, Any]:
    """This process, and what tells whether its number means the same process elsewhere."""
    system = [platform.node()]
    with contextlib.suppress(OSError):  # Not on Linux.
        system.append(Path("/proc/sys/kernel/random/boot_id").read_text().strip())
        system.append(os.readlink("/proc/self/ns/pid"))
    return {"pid": os.getpid(), "system": system}


def _has_ended(lease: dict[str, Any]) -> bool:
    """Whether the holder of a lease was a process of this system that has ended."""
    own = _process()
    # Elsewhere numbers of processes may not be comparable, and on Windows signal 0 ends a process.
    if len(own["system"]) < 3 or lease["system"] != own["system"]:
        return False
    try:
        os.kill(lease["pid"], 0)
    except OSError as error:
        return error.errno == errno.ESRCH
    return False


@contextlib.contextmanager
def _storage_errors(folder: os.PathLike[str] | str) -> Iterator[None]:
    """Turns errors of the storage and of its credentials into a UsageError."""
    from google.api_core.exceptions import GoogleAPIError
    from google.auth.exceptions import GoogleAuthError

    try:
        yield
    except (GoogleAPIError, GoogleAuthError) as error:
        reason = str(error).splitlines()[0]
        raise UsageError(
            f"{folder} cannot be locked: {reason}; check the name of the bucket, and that this "
            "machine may write there"
        ) from error
