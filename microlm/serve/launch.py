"""A server of ours as a process. Enters: a model directory; leaves: its URL, or the sentence it died with."""

from __future__ import annotations

import json
import subprocess
import sys
import threading
import time
from collections import deque
from pathlib import Path
from types import TracebackType

import microlm
from microlm.core import runtime
from microlm.core.client import Client
from microlm.core.errors import UserError

TAIL_LINES = 40
POLL_S = 0.05


class ServerProcess:
    """`microlm serve DIRECTORY` in a process of its own, from `__enter__` to `__exit__`.

    `log` keeps everything the server printed. The key, when there is one, goes through the environment.
    On Linux the server dies with the thread that started it, so that a killed parent leaves no orphan.
    """

    def __init__(
        self,
        directory: str | Path,
        port: int = 0,
        *,
        api_key: str | None = None,
        timeout_s: float = 120.0,
        grace_s: float = 35.0,
        log: Path | None = None,
    ) -> None:
        self.directory = str(directory)
        self.url = ""
        self._port = port
        self._api_key = api_key
        self._timeout_s = timeout_s
        self._grace_s = grace_s
        self._log = log
        self._tail: deque[str] = deque(maxlen=TAIL_LINES)
        self._process: subprocess.Popen[str] | None = None
        self._reader: threading.Thread | None = None

    def __enter__(self) -> ServerProcess:
        self.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, e: BaseException | None, tb: TracebackType | None
    ) -> None:
        self.stop()

    @property
    def pid(self) -> int:
        """The process's number."""
        assert self._process is not None
        return self._process.pid

    @property
    def tail(self) -> str:
        """The last lines it printed."""
        return "\n".join(self._tail)

    def start(self) -> None:
        """Start, wait until `/health` answers; if it dies or is late, a UserError has its last line."""
        command = [sys.executable, "-m", "microlm", "serve", self.directory, "--port", str(self._port)]
        self._process = subprocess.Popen(
            [*command, "--json", "--die-with-parent"],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            encoding="utf-8",
            errors="replace",
            env=_environment(self._api_key),
        )
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()
        try:
            self._wait_until_healthy(time.monotonic() + self._timeout_s)
        except BaseException:
            self.stop()
            raise

    def stop(self) -> int | None:
        """Ask it to end, kill it after the grace time; its exit code (None when it never ran)."""
        if self._process is None:
            return None
        if self._process.poll() is None:
            self._process.terminate()
            try:
                self._process.wait(self._grace_s)
            except subprocess.TimeoutExpired:
                self._process.kill()
                self._process.wait()
        if self._reader is not None:
            self._reader.join(5)
        return self._process.returncode

    def _wait_until_healthy(self, deadline: float) -> None:
        assert self._process is not None
        while True:
            code = self._process.poll()
            if code is not None:
                if self._reader is not None:
                    self._reader.join(5)
                raise UserError(
                    f"{self.directory}: the server ended with code {code} at start: {self._last_line()}"
                )
            if time.monotonic() > deadline:
                late = f"the server was not ready within {self._timeout_s:g} s; its last line"
                raise UserError(f"{self.directory}: {late}: {self._last_line()}")
            if self.url and self._is_healthy():
                return
            time.sleep(POLL_S)

    def _is_healthy(self) -> bool:
        try:
            with Client(self.url, timeout_s=5) as client:
                return client.health()
        except UserError:
            return False

    def _last_line(self) -> str:
        lines = [line for line in self._tail if line.strip()]
        return lines[-1] if lines else "it printed nothing"

    def _read(self) -> None:
        """Collect what it prints; its first JSON line carries the URL."""
        assert self._process is not None and self._process.stdout is not None
        log = self._log.open("w", encoding="utf-8") if self._log else None
        try:
            for line in self._process.stdout:
                self._tail.append(line.rstrip("\n"))
                if log:
                    log.write(line)
                    log.flush()
                if not self.url and line.startswith("{"):
                    self.url = _url_in(line)
        finally:
            if log:
                log.close()


def _url_in(line: str) -> str:
    try:
        return str(json.loads(line).get("url", ""))
    except ValueError:
        return ""


def _environment(api_key: str | None) -> dict[str, str]:
    """Ours, with this very package importable and only the given key."""
    home = str(Path(microlm.__file__).resolve().parents[1])
    paths = [home, runtime.env("PYTHONPATH")]
    return runtime.child_env(
        {
            "PYTHONPATH": ":".join(p for p in paths if p),
            "PYTHONUNBUFFERED": "1",
            "MICROLM_API_KEY": api_key or "",
        }
    )
