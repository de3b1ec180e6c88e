"""Fetch pictures over http and https, with limits on time and size."""

import functools
import http.client
import io
import ssl
import string
import time
import urllib.error
import urllib.parse
import urllib.request
from typing import Any

from PIL import Image

from . import __version__
from .decode import MAX_PIXELS, ImageError, decode_image

TIMEOUT_SECONDS = 10.0
RETRIES = 2
MAX_BYTES = 32 * 2**20

_SCHEMES = ("http", "https")
_CHUNK = 64 * 1024
# Answers that may be another one next time; a 404 stays a 404.
_PASSING = {408, 429, 500, 502, 503, 504}


class _OnlyHttp(urllib.request.HTTPRedirectHandler):
    """Follows redirects to http and https alone; urllib's own handler also follows them to ftp."""

    def redirect_request(self, req, fp, code, msg, headers, newurl):
        if not _is_http(newurl):  # as urllib's own does for all that it does not know
            raise urllib.error.HTTPError(newurl, code, msg, headers, fp)
        return super().redirect_request(req, fp, code, msg, headers, newurl)


class _InTime(io.RawIOBase):
    """What a connection receives, each read limited to the time that is left.

    A socket's own time-out starts anew with every byte, so that a server that drips its header or its picture would
    never meet it.
    """

    def __init__(self, stream: Any, sock: Any, deadline: float):
        self._stream, self._sock, self._deadline = stream, sock, deadline

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int | None:
        self._sock.settimeout(_time_left(self._deadline))
        return self._stream.readinto(buffer)

    def close(self) -> None:
        self._stream.close()
        super().close()


class _Response(http.client.HTTPResponse):
    def __init__(self, sock: Any, *args: Any, deadline: float, **options: Any):
        super().__init__(sock, *args, **options)
        self.fp = io.BufferedReader(_InTime(self.fp.detach(), sock, deadline), _CHUNK)


class _Http(urllib.request.HTTPHandler):
    def __init__(self, deadline: float):
        super().__init__()
        self.deadline = deadline

    def http_open(self, req):
        return self.do_open(_connections(http.client.HTTPConnection, self.deadline), req)


class _Https(urllib.request.HTTPSHandler):
    def __init__(self, deadline: float):
        super().__init__(context=_tls_context())
        self.deadline = deadline

    def https_open(self, req):
        connections = _connections(http.client.HTTPSConnection, self.deadline)
        return self.do_open(connections, req, context=_tls_context())


def _connections(kind: Any, deadline: float) -> Any:
    def connect(host: str, **options: Any) -> Any:
        connection = kind(host, **{**options, "timeout": _time_left(deadline)})
        connection.response_class = functools.partial(_Response, deadline=deadline)
        return connection

    return connect


@functools.cache
def _tls_context() -> ssl.SSLContext:
    # Reading the certificates takes longer than many a picture.
    return ssl.create_default_context()


def _time_left(deadline: float) -> float:
    left = deadline - time.monotonic()
    if left <= 0:
        raise TimeoutError
    return left


def _is_http(url: str) -> bool:
    return url.partition(":")[0].lower() in _SCHEMES


def _quoted(url: str) -> str:
    """The address in ASCII and without spaces, as a browser would send it; what is quoted already stays as it is."""
    parts = urllib.parse.urlsplit(url)
    quote = functools.partial(urllib.parse.quote, safe=string.punctuation)
    host = parts.netloc if parts.netloc.isascii() else parts.netloc.encode("idna").decode("ascii")
    return urllib.parse.urlunsplit(parts._replace(netloc=host, path=quote(parts.path), query=quote(parts.query)))


def fetch_image(
    url: str,
    *,
    timeout: float = TIMEOUT_SECONDS,
    retries: int = RETRIES,
    max_bytes: int = MAX_BYTES,
    max_pixels: int = MAX_PIXELS,
) -> Image.Image:
    """Fetch and decode a picture.

    Args:
        url: An http or https address.
        timeout: Seconds for one attempt in all, however slowly the bytes come (looking up the host's name aside, which
            the operating system limits).
        retries: How often to try again after errors that may pass.
        max_bytes: Larger files are given up.
        max_pixels: Larger pictures are refused before they are decoded.

    Returns:
        The picture as RGB, see :func:`.decode.decode_image`.

    Raises:
        ImageError: with the reason why it could not be had: 'scheme', 'http', 'timeout', 'network', 'too_large',
            'not_an_image' or 'truncated'.
    """
    if not isinstance(url, str) or not _is_http(url.strip()):
        raise ImageError("scheme", f"only http and https addresses are fetched, got {str(url)[:100]!r}")
    for attempt in range(retries + 1):
        try:
            return decode_image(_read(url.strip(), timeout, max_bytes), max_pixels=max_pixels)
        except _PassingError as error:
            if attempt == retries:
                raise ImageError(error.reason, str(error)) from error.__cause__
            time.sleep(min(0.1 * 2**attempt, 1.0))
    raise AssertionError("unreachable")


class _PassingError(ImageError):
    """An error that may not come again."""


def _read(url: str, timeout: float, max_bytes: int) -> bytes:
    deadline = time.monotonic() + timeout
    try:
        request = urllib.request.Request(_quoted(url), headers={"User-Agent": f"minimagen_fast/{__version__}"})
        opener = urllib.request.build_opener(_Http(deadline), _Https(deadline), _OnlyHttp)
        with opener.open(request) as response:
            expected = response.headers.get("Content-Length")
            expected = int(expected) if expected is not None and expected.isdecimal() else None
            if expected is not None and expected > max_bytes:
                raise ImageError("too_large", f"{expected} bytes, at most {max_bytes} are allowed")
            data = bytearray()
            while chunk := response.read1(_CHUNK):
                data += chunk
                if len(data) > max_bytes:
                    raise ImageError("too_large", f"more than the {max_bytes} bytes that are allowed")
            if expected is not None and len(data) < expected:
                raise _PassingError("truncated", f"{len(data)} of {expected} bytes came")
            return bytes(data)
    except urllib.error.HTTPError as error:
        error.close()
        # Not the header Location, which may be anything, and in any answer: of a redirect this is where it leads.
        if not _is_http(error.url):
            raise ImageError("scheme", f"redirected to {error.url[:100]!r}, which is neither http nor https") from error
        kind = _PassingError if error.code in _PASSING else ImageError
        raise kind("http", f"the server answered {error.code} {error.reason}") from error
    except TimeoutError as error:
        raise _PassingError("timeout", f"no whole answer within {timeout} seconds") from error
    except urllib.error.URLError as error:
        if isinstance(error.reason, TimeoutError):
            raise _PassingError("timeout", f"no connection within {timeout} seconds") from error
        raise _PassingError("network", f"no connection: {error.reason}") from error
    except http.client.IncompleteRead as error:
        raise _PassingError("truncated", "the answer ended early") from error
    except http.client.InvalidURL as error:
        raise ImageError("scheme", f"not a valid address: {error}") from error
    except (http.client.HTTPException, OSError) as error:
        raise _PassingError("network", f"the connection broke: {error!r}") from error
    except ValueError as error:  # an address that urllib cannot take apart
        raise ImageError("scheme", f"not a valid address: {error}") from error
