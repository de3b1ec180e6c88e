"""An http server on the loopback interface that serves pictures in good and bad shape."""

import io
import threading
import time
from collections import Counter
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import numpy as np
from PIL import Image


def encoded(image: Image.Image, kind: str = "PNG", **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def picture(mode: str = "RGB", size: tuple[int, int] = (24, 20)) -> Image.Image:
    """A smooth picture of any mode, from dark to light and from left to right."""
    ramp = np.tile(np.linspace(0, 255, size[0], dtype=np.uint8), (size[1], 1))
    rgb = Image.fromarray(np.stack([ramp, ramp[::-1], 255 - ramp], axis=-1))
    if mode == "I;16":
        return Image.fromarray(ramp.astype(np.uint16) * 257)
    if mode == "RGBA":
        rgb.putalpha(Image.fromarray(ramp))
        return rgb
    return rgb.convert(mode)


def palette_with_transparency() -> bytes:
    return encoded(picture("RGBA").quantize(16), "PNG", transparency=0)


# A valid header that claims 40000x40000 pixels, and next to no data.
HUGE_PIXELS = encoded(Image.new("1", (40000, 40000)), "PNG")

GOOD = {
    "rgb": encoded(picture()),
    "jpeg": encoded(picture(), "JPEG"),
    "grey": encoded(picture("L")),
    "sixteen": encoded(picture("I;16")),
    "palette": palette_with_transparency(),
    "cmyk": encoded(picture("CMYK"), "JPEG"),
    "alpha": encoded(picture("RGBA")),
    "one_pixel": encoded(picture(size=(1, 1))),
    "constant": encoded(Image.new("RGB", (9, 9), (7, 7, 7))),
}

# What each bad answer must be counted as.
BAD = {
    "cut_file": "truncated",
    "cut_answer": "truncated",
    "huge_bytes": "too_large",
    "huge_pixels": "too_large",
    "slow": "timeout",
    "drip": "timeout",
    "missing": "http",
    "always_500": "http",
    "to_file": "scheme",
    "text": "not_an_image",
    "empty": "not_an_image",
}


class _Handler(BaseHTTPRequestHandler):
    def log_message(self, *args):
        pass

    def _answer(self, data: bytes, length: int | None = None, status: int = 200):
        self.send_response(status)
        self.send_header("Content-Length", str(len(data) if length is None else length))
        self.end_headers()
        self.wfile.write(data)

    def do_GET(self):
        name = self.path.strip("/")
        self.server.requests[name] += 1
        self.server.agents.add(self.headers.get("User-Agent"))
        try:
            if name in GOOD:
                self._answer(GOOD[name])
            elif name == "cut_file":
                self._answer(GOOD["jpeg"][: len(GOOD["jpeg"]) * 3 // 4])
            elif name == "cut_answer":
                self._answer(GOOD["rgb"][:50], length=len(GOOD["rgb"]))
            elif name == "huge_bytes":
                self._answer(b"\0" * 2**20)
            elif name == "huge_pixels":
                self._answer(HUGE_PIXELS)
            elif name == "slow":
                self.server.stop.wait(5)
            elif name == "drip":
                self.send_response(200)
                self.end_headers()
                while not self.server.stop.wait(0.05):
                    self.wfile.write(b"x")
                    self.wfile.flush()
            elif name == "second_time" and self.server.requests[name] > 1:
                self._answer(GOOD["rgb"])
            elif name in ("always_500", "second_time"):
                self._answer(b"", status=500)
            elif name in ("to_file", "to_rgb"):
                self.send_response(302)
                self.send_header("Location", "file:///etc/hostname" if name == "to_file" else "/rgb")
                self.send_header("Content-Length", "0")
                self.end_headers()
            elif name == "text":
                self._answer(b"<html>no picture here</html>")
            elif name == "empty":
                self._answer(b"")
            else:
                self._answer(b"", status=404)
        except (BrokenPipeError, ConnectionResetError):
            pass  # the client has given up, which is what it should do


@contextmanager
def serving():
    """Yields the server; its attribute ``url`` is the address that a name is appended to."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), _Handler)
    server.daemon_threads = True
    server.requests, server.agents, server.stop = Counter(), set(), threading.Event()
    server.url = f"http://127.0.0.1:{server.server_port}/"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)
    thread.start()
    try:
        yield server
    finally:
        server.stop.set()
        server.shutdown()
        server.server_close()
        thread.join()
        time.sleep(0)
