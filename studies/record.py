"""What a run leaves on disk, so that it can be stopped at any point and gone on with.

A file is either whole or not there: it is written beside its place, flushed to the disk, then renamed. A checkpoint
carries its own digest. Lines of metrics are only ever appended, and a last line cut short is not read.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import io
import json
import os
import platform
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

import lowprec

LOCK_SECONDS = 10.0
"""How long to wait for a process that is about to leave a folder."""

Json = dict[str, Any]


def write(path: Path, data: bytes) -> None:
    """Put a whole file in place, or leave what was there.

    Raises:
        OSError: when the disk is full, saying that nothing saved is lost.
    """
    part = path.with_name(path.name + ".part")
    try:
        with part.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        part.replace(path)
        _sync_folder(path.parent)
    except OSError as error:
        part.unlink(missing_ok=True)
        raise _explained(error, path) from error


def _sync_folder(folder: Path) -> None:
    """A rename is on the disk once its folder is."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _explained(error: OSError, path: Path) -> OSError:
    if error.errno not in (errno.ENOSPC, errno.EDQUOT):
        return error
    text = f"the disk is full: {path} could not be written; what was saved before is whole"
    return OSError(error.errno, text)


def write_json(path: Path, value: Json) -> None:
    """`write` a JSON object."""
    write(path, (json.dumps(value, indent=2) + "\n").encode())


def read_json(path: Path) -> Json:
    """ValueError where a file is not what `write_json` wrote."""
    try:
        value: Json = json.loads(path.read_bytes())
    except ValueError:
        raise ValueError(f"{path} is damaged: it is not JSON") from None
    return value


# Checkpoints: a digest, then what torch.save wrote.


def save_checkpoint(path: Path, state: Json) -> None:
    """Save tensors and plain values."""
    buffer = io.BytesIO()
    torch.save(state, buffer)
    payload = buffer.getvalue()
    write(path, hashlib.sha256(payload).digest() + payload)


def load_checkpoint(path: Path) -> Json | None:
    """What was saved, on the CPU; None where nothing was.

    Raises:
        ValueError: for a file that is damaged or cut short.
    """
    if not path.exists():
        return None
    data = path.read_bytes()
    digest, payload = data[:32], data[32:]
    if hashlib.sha256(payload).digest() != digest:
        raise ValueError(f"{path} is damaged or cut short: delete it to start its part of the run over")
    state: Json = torch.load(io.BytesIO(payload), map_location="cpu", weights_only=True)
    return state


# Metrics: one JSON object a line.


def append(path: Path, line: Json) -> None:
    """Add a line of metrics."""
    try:
        with path.open("ab") as file:
            file.write((json.dumps(line) + "\n").encode())
    except OSError as error:
        raise _explained(error, path) from error


def lines(path: Path) -> list[Json]:
    """The whole lines of metrics so far."""
    if not path.exists():
        return []
    return [line for raw in path.read_bytes().split(b"\n") if (line := _parsed(raw)) is not None]


def _parsed(raw: bytes) -> Json | None:
    try:
        value: Json = json.loads(raw)
    except ValueError:
        return None
    return value


def rewind(path: Path, update: int) -> None:
    """Drop the lines written after a checkpoint's update: they will be written again."""
    kept = [line for line in lines(path) if line["update"] <= update]
    write(path, b"".join((json.dumps(line) + "\n").encode() for line in kept))


# A run's folder.


def start(folder: Path, config: Json) -> None:
    """Make a run's folder and say in it what is run, by which code, where.

    Raises:
        ValueError: for a folder that holds something else.
    """
    if (folder / "config.json").exists():
        raise ValueError(f"{folder} holds a run: go on with it by --resume, or name another folder by --out")
    if folder.exists() and any(folder.iterdir()):
        raise ValueError(f"{folder} is not empty and holds no run: name another folder by --out")
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / "config.json", config | {"commit": commit(), "lowprec": lowprec.__version__})


def reopen(folder: Path) -> Json:
    """What `start` wrote; ValueError where it did not."""
    if not (folder / "config.json").exists():
        raise ValueError(f"{folder} holds no run to resume")
    return read_json(folder / "config.json")


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Keep other processes from working in a folder; the lock goes with the process that holds it.

    Raises:
        ValueError: when another process works there.
    """
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        deadline = time.monotonic() + LOCK_SECONDS
        while not _try_lock(descriptor):
            if time.monotonic() > deadline:
                raise ValueError(f"another process is at work in {folder}")
            time.sleep(0.05)
        yield
    finally:
        os.close(descriptor)


def _try_lock(descriptor: int) -> bool:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def commit() -> str:
    """The commit of the code that runs, with "+" where files differ from it; "" outside a checkout."""
    here = Path(__file__).resolve().parent
    try:
        _git(here, "ls-files", "--error-unmatch", Path(__file__).name)
        head = _git(here, "rev-parse", "--short=12", "HEAD")
        return head + ("+" if _git(here, "status", "--porcelain", "--untracked-files=no") else "")
    except (OSError, subprocess.CalledProcessError):
        return ""


def _git(folder: Path, *words: str) -> str:
    done = subprocess.run(["git", *words], cwd=folder, capture_output=True, text=True, check=True, timeout=20)
    return done.stdout.strip()


def device_name(device: torch.device) -> str:
    """The processor or GPU, and torch's version."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else _processor()
    return f"{name}, torch {torch.__version__}"


def _processor() -> str:
    try:
        text = Path("/proc/cpuinfo").read_text()
    except OSError:
        return platform.machine()
    names = [line.partition(":")[2].strip() for line in text.splitlines() if line.startswith("model name")]
    return names[0] if names else platform.machine()
