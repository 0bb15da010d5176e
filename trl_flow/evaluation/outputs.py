"""Files that are whole or not there, and the versions that a run was made with."""

import json
import os
import platform
import re
import secrets
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import IO, Any


try:
    import fcntl
except ImportError:  # on Windows
    fcntl = None

LOCK = ".lock"
_PACKAGES = ("trl_flow", "torch", "diffusers", "transformers", "trl", "peft", "accelerate", "datasets", "numpy")


def versions() -> dict[str, str]:
    """Versions of Python and of the packages that decide what a run computes."""
    found = {"python": platform.python_version()} | dict.fromkeys(_PACKAGES, "not installed")
    for package in _PACKAGES:
        with suppress(PackageNotFoundError):
            found[package] = version(package)
    return found


@contextmanager
def locked(
    folder: str | os.PathLike, doing: str, *, name: str = LOCK, remedy: str = "choose another output_dir"
) -> Iterator[None]:
    """Keeps other processes from `doing` the same in a folder, where the system can (Windows cannot). The lock, on the
    file `name`, ends with the process, however that ends. `ValueError` if another process has it, which is named, or
    the folder cannot be written."""
    folder = Path(folder)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = open(folder / name, "a+", encoding="utf-8")
    except OSError as error:
        raise ValueError(f"output_dir {folder} cannot be written: {error}.") from error
    with lock:
        if fcntl is not None:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as error:
                lock.seek(0)
                holder = f" ({who})" if (who := lock.read(200).strip()) else ""
                running = f"another process is {doing} {folder}{holder}"
                raise ValueError(f"{running}. Wait until it ends, or {remedy}.") from error
            except OSError:  # not all file systems have locks
                pass
        with suppress(OSError):  # a full disk is found by what matters
            lock.truncate(0)
            lock.write(f"pid {os.getpid()} on {platform.node()}")
            lock.flush()
        yield


def is_locked(folder: str | os.PathLike) -> bool | None:
    """Whether a process has the lock of [`locked`]; `None` where that cannot be told."""
    if fcntl is None:
        return None
    try:
        with open(Path(folder, LOCK)) as lock:
            fcntl.flock(lock, fcntl.LOCK_SH | fcntl.LOCK_NB)
        return False
    except BlockingIOError:
        return True
    except OSError:
        return None


def half_written(folder: Path) -> list[Path]:
    """What [`whole_file`] has left in a folder where a process was killed."""
    return [path for path in folder.glob(".*.tmp") if re.fullmatch(r"\..+\.[0-9a-f]{8}\.tmp", path.name)]


@contextmanager
def whole_file(path: str | os.PathLike) -> Iterator[IO[bytes]]:
    """A binary file to write, which gets the name `path` when it is complete and on disk. If that fails, whatever had
    the name before stays."""
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")
    try:
        with open(temporary, "xb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def write_json(path: str | os.PathLike, content: Mapping[str, Any]) -> None:
    """Writes a JSON file whole or not at all; `ValueError` for NaN and infinity, which JSON does not know."""
    text = json.dumps(content, indent=2, ensure_ascii=False, allow_nan=False) + "\n"
    with whole_file(path) as file:
        file.write(text.encode())


def read_json(path: Path) -> dict[str, Any]:
    """What `write_json` wrote; `ValueError` if the file is damaged."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(content, dict):
            raise ValueError(f"it holds a {type(content).__name__}")
        return content
    except (OSError, ValueError) as error:
        raise ValueError(f"{path} cannot be read: {error}. Fix it, or move it away.") from error
