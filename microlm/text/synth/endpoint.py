"""Asking an endpoint as often as it allows. Enters: requests; leaves: replies, after waiting where needed.

`Limiter` spaces requests and tokens out; `BulkClient` tells what passes by itself from what does not.
"""

from __future__ import annotations

import email.utils
import math
import random
import threading
import time
from datetime import UTC, datetime

import httpx

from microlm.core.client import Client
from microlm.core.errors import UserError

PASSING = (408, 425, 429, 500, 502, 503, 504, 529)  # asking again may help
MIN_WAIT_S, MAX_WAIT_S = 0.1, 600.0
_FIRST_WAIT_S, _LONGEST_WAIT_S = 0.5, 60.0


class Passing(Exception):
    """The endpoint could not answer just now. `status` 0: it was not reached or said nothing."""

    def __init__(self, sentence: str, status: int = 0, wait_s: float | None = None) -> None:
        super().__init__(sentence)
        self.status = status
        self.wait_s = wait_s


class Stopped(Exception):
    """The run is stopping: nothing new is asked."""


class BulkClient(Client):
    """The client, with `Passing` for what may go well a moment later."""

    def request(self, method: str, path: str, content: bytes | None = None) -> httpx.Response:
        """One exchange; raises Passing when the endpoint is busy, silent or away."""
        try:
            response = super().request(method, path, content)
        except UserError as e:
            raise Passing(str(e)) from None
        if response.status_code in PASSING:
            sentence = f"{self.url}{path}: HTTP {response.status_code}: {response.text[:200]}"
            wait_s = retry_after_s(response.headers.get("retry-after", ""))
            raise Passing(sentence, response.status_code, wait_s)
        return response


class Limiter:
    """Says when the next request may start. Requests are evenly spaced, so no minute holds too many.

    Tokens are counted when a request starts, by an estimate, and set right by `settle`.
    """

    def __init__(self, requests_per_minute: float | None = None, tokens_per_minute: float | None = None):
        self._request_s = 60 / requests_per_minute if requests_per_minute else 0.0
        self._token_s = 60 / tokens_per_minute if tokens_per_minute else 0.0
        self._next_request = self._next_token = self._paused = 0.0
        self._stopped = False
        self._turn = threading.Condition()

    def acquire(self, tokens: int) -> None:
        """Wait for a turn and take it; raises Stopped."""
        with self._turn:
            while not self._stopped:
                now = time.monotonic()
                wait_s = max(self._next_request, self._next_token, self._paused) - now
                if wait_s <= 0:
                    self._next_request = now + self._request_s
                    self._next_token = max(now, self._next_token) + tokens * self._token_s
                    return
                self._turn.wait(wait_s)
            raise Stopped

    def settle(self, estimated: int, used: int) -> None:
        """A request took `used` tokens, not as many as estimated."""
        with self._turn:
            self._next_token += (used - estimated) * self._token_s
            self._turn.notify_all()

    def pause(self, seconds: float) -> None:
        """Nobody starts before so many seconds have gone by."""
        with self._turn:
            self._paused = max(self._paused, time.monotonic() + seconds)

    def sleep(self, seconds: float) -> None:
        """Wait alone; raises Stopped."""
        with self._turn:
            if self._turn.wait_for(lambda: self._stopped, seconds):
                raise Stopped

    def stop(self) -> None:
        """End all waiting: nothing new is asked."""
        with self._turn:
            self._stopped = True
            self._turn.notify_all()


def backoff_s(retry: int) -> float:
    """How long to wait before the repetition number `retry` (from 0): doubling, with jitter."""
    longest = min(_LONGEST_WAIT_S, _FIRST_WAIT_S * 2 ** min(retry, 16))
    return random.uniform(longest / 2, longest)


def retry_after_s(header: str) -> float | None:
    """Seconds of a Retry-After header (a number or a date), at most ten minutes; None: not usable."""
    try:
        seconds = float(header)
    except ValueError:
        try:
            date = email.utils.parsedate_to_datetime(header)
        except ValueError:
            return None
        seconds = (date.replace(tzinfo=date.tzinfo or UTC) - datetime.now(UTC)).total_seconds()
    return min(max(seconds, MIN_WAIT_S), MAX_WAIT_S) if math.isfinite(seconds) else None
