"""The HTTP session of the OTLP exporter: one try for each request, whose outcome the sink can read."""

from __future__ import annotations

import time
from email.utils import parsedate_to_datetime
from typing import Any, Final

import requests

from bgtasks.errors import text_of
from bgtasks.events.errors import Reject, Retry, SinkError

__all__ = ["OneTrySession"]

# The collector does not take these events; smaller batches may do.
DOES_NOT_TAKE: Final = frozenset((400, 413, 422))
# The collector may take them later, when it has capacity or other credentials.
LATER: Final = frozenset((401, 403, 408, 425, 429))


class _NotSentError(Exception):
    """Ends the exporter's own tries, which know nothing of the publisher's."""


class OneTrySession(requests.Session):
    """Sends each request once, follows no redirect, and notes why a request failed."""

    # Without a lock: the sink has one thread.
    _failure: requests.Response | Exception | None = None

    def send(self, request: requests.PreparedRequest, **kwargs: Any) -> requests.Response:
        """Send a request.

        Raises:
            _NotSentError: there was no answer, or one that does not mean success.

        """
        # A redirect may lead from https to http, and with it the headers that hold credentials.
        kwargs["allow_redirects"] = False
        try:
            try:
                answer = super().send(request, **kwargs)
            except requests.ConnectionError:
                # As a rule, the server closed a connection that was idle.
                answer = super().send(request, **kwargs)
        except Exception as error:
            self._failure = error
            raise _NotSentError(text_of(error)) from error
        if 200 <= answer.status_code < 300:
            self._failure = None
            return answer
        self._failure = answer
        raise _NotSentError(f"status {answer.status_code}")

    def outcome(self, server: str, count: int) -> Exception:
        """Return the error of the last request, for a batch of ``count`` events."""
        failure, self._failure = self._failure, None
        if failure is None:
            return SinkError(f"{server}: the export failed; the exporter's log says why")
        if isinstance(failure, Exception):
            return SinkError(f"{server}: the export failed: {text_of(failure)}")
        status = failure.status_code
        text = f"{server}: status {status} {failure.reason or ''}".rstrip()
        if status < 400:
            place = failure.headers.get("Location", "another address")
            return SinkError(f"{text}: it redirects to {place}, which is not followed; use that as endpoint")
        if status in DOES_NOT_TAKE:
            return Reject(reason=text)
        if status >= 500 or status in LATER:
            return Retry(after=_seconds(failure.headers.get("Retry-After")), reason=text)
        return Reject(range(count), f"{text}; is the endpoint right?")


def _seconds(retry_after: str | None) -> float | None:
    """Return the seconds of a Retry-After header, which holds a number or a date; None if there is none."""
    if retry_after is None:
        return None
    text = retry_after.strip()
    if text.isascii() and text.isdigit():
        return float(text)
    try:
        return max(parsedate_to_datetime(text).timestamp() - time.time(), 0.0)
    except (TypeError, ValueError):
        return None
