"""Fetch pictures over http and https, with limits on time and size."""

import http.client
import time
import urllib.error
import urllib.parse
import urllib.request

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
        return super().redirect_request(req, fp, code, msg, headers, newurl) if _is_http(newurl) else None


_opener = urllib.request.build_opener(_OnlyHttp)


def _is_http(url: str) -> bool:
    return url.partition(":")[0].lower() in _SCHEMES


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
        timeout: Seconds for one attempt in all, however slowly the bytes come.
        retries: How often to try again after errors that may pass.
        max_bytes: Larger files are given up.
        max_pixels: Larger pictures are refused before they are decoded.

    Returns:
        The picture as RGB, see :func:`.decode.decode_image`.

    Raises:
        ImageError: with the reason why it could not be had.
    """
    if not isinstance(url, str) or not _is_http(url):
        raise ImageError("scheme", f"only http and https addresses are fetched, got {str(url)[:100]!r}")
    for attempt in range(retries + 1):
        try:
            return decode_image(_read(url, timeout, max_bytes), max_pixels=max_pixels)
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
        request = urllib.request.Request(url, headers={"User-Agent": f"minimagen_fast/{__version__}"})
        with _opener.open(request, timeout=timeout) as response:
            expected = response.headers.get("Content-Length")
            expected = int(expected) if expected is not None and expected.isdecimal() else None
            if expected is not None and expected > max_bytes:
                raise ImageError("too_large", f"{expected} bytes, at most {max_bytes} are allowed")
            data = bytearray()
            # read1 returns with whatever has come, so that a server that drips cannot outlast the deadline.
            while chunk := response.read1(_CHUNK):
                data += chunk
                if len(data) > max_bytes:
                    raise ImageError("too_large", f"more than the {max_bytes} bytes that are allowed")
                if time.monotonic() > deadline:
                    raise _PassingError("timeout", f"not all there after {timeout} seconds")
            if expected is not None and len(data) < expected:
                raise _PassingError("truncated", f"{len(data)} of {expected} bytes came")
            return bytes(data)
    except urllib.error.HTTPError as error:
        error.close()
        target = urllib.parse.urljoin(url, error.headers.get("Location", ""))
        if not _is_http(target):
            raise ImageError("scheme", f"redirected to {target[:100]!r}, which is neither http nor https") from error
        kind = _PassingError if error.code in _PASSING else ImageError
        raise kind("http", f"the server answered {error.code} {error.reason}") from error
    except TimeoutError as error:
        raise _PassingError("timeout", f"no answer within {timeout} seconds") from error
    except urllib.error.URLError as error:
        if isinstance(error.reason, TimeoutError):
            raise _PassingError("timeout", f"no connection within {timeout} seconds") from error
        raise _PassingError("network", f"no connection: {error.reason}") from error
    except (http.client.HTTPException, OSError) as error:
        raise _PassingError("network", f"the connection broke: {error!r}") from error
    except ValueError as error:  # an address that urllib cannot take apart
        raise ImageError("scheme", f"not a valid address: {error}") from error
