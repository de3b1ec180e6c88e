"""Fetching and decoding, against a server that misbehaves in every way."""

import io
import pickle
import socket
import threading
import time
from contextlib import contextmanager

import numpy as np
import pytest
from picture_server import BAD, GOOD, encoded, picture, serving
from PIL import Image, ImageOps

from minimagen_fast.decode import ImageError, decode_image
from minimagen_fast.fetch import fetch_image


@pytest.fixture(scope="module")
def server():
    with serving() as server:
        yield server


@pytest.mark.parametrize("name", GOOD)
def test_every_kind_of_picture_becomes_rgb(server, name):
    image = fetch_image(server.url + name)
    assert image.mode == "RGB" and image.size == Image.open(io.BytesIO(GOOD[name])).size


@pytest.mark.parametrize("name", BAD)
def test_every_bad_answer_has_its_reason(server, name):
    with pytest.raises(ImageError) as caught:
        fetch_image(server.url + name, timeout=1.5, retries=1, max_bytes=2**19)
    assert caught.value.reason == BAD[name]
    copy = pickle.loads(pickle.dumps(caught.value))
    assert (copy.reason, str(copy)) == (caught.value.reason, str(caught.value))


def test_a_slow_server_is_given_up_in_time(server):
    for name in ("slow", "drip"):
        started = time.monotonic()
        with pytest.raises(ImageError):
            fetch_image(server.url + name, timeout=0.4, retries=0)
        assert time.monotonic() - started < 2


@contextmanager
def answering(*parts: bytes, pause: float = 0.0):
    """Yields the address of a server that sends these bytes, `pause` seconds apart, and hangs up; and its requests."""
    done, requests = threading.Event(), []

    def serve(listener):
        while not done.is_set():
            try:
                connection, _ = listener.accept()
            except TimeoutError:
                continue
            with connection:
                requests.append(connection.recv(65536))
                try:
                    for part in parts:
                        connection.sendall(part)
                        if done.wait(pause):
                            return
                except (BrokenPipeError, ConnectionResetError):
                    pass  # the client has given up

    with socket.create_server(("127.0.0.1", 0)) as listener:
        listener.settimeout(0.05)
        thread = threading.Thread(target=serve, args=(listener,), daemon=True)
        thread.start()
        try:
            yield f"http://127.0.0.1:{listener.getsockname()[1]}/", requests
        finally:
            done.set()
            thread.join()


def test_a_dripping_header_is_given_up_in_time():
    # Every byte comes well within the time-out, the header never ends.
    with answering(b"HTTP/1.0 200 OK\r\nX: ", *[b"x"] * 100, pause=0.1) as (url, _):
        started = time.monotonic()
        with pytest.raises(ImageError) as caught:
            fetch_image(url, timeout=0.4, retries=0)
        assert caught.value.reason == "timeout" and time.monotonic() - started < 2


def test_a_cut_chunked_answer_is_truncated_and_tried_again():
    cut = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\nff\r\nabc"
    with answering(cut) as (url, requests):
        with pytest.raises(ImageError) as caught:
            fetch_image(url, retries=1)
        assert caught.value.reason == "truncated" and len(requests) == 2


@pytest.mark.parametrize(
    "status, target, reason",
    [
        ("404 Not Found", "http://[bad", "http"),
        ("404 Not Found", "file:///etc/hostname", "http"),
        ("304 Not Modified", "//[bad", "http"),
        ("302 Found", "file:///etc/hostname", "scheme"),
        ("301 Moved", "ftp://127.0.0.1/x", "scheme"),
        ("302 Found", "", "http"),
    ],
)
def test_wherever_an_answer_leads_it_has_a_reason(status, target, reason):
    with answering(f"HTTP/1.1 {status}\r\nLocation: {target}\r\nContent-Length: 0\r\n\r\n".encode()) as (url, _):
        with pytest.raises(ImageError) as caught:
            fetch_image(url, retries=0)
        assert caught.value.reason == reason


@pytest.mark.parametrize(
    "path, sent", [("a b.png", b"/a%20b.png"), ("\xe4?q=\u4e2d", b"/%C3%A4?q=%E4%B8%AD"), ("%20", b"/%20")]
)
def test_addresses_are_quoted(path, sent):
    data = encoded(picture())
    with answering(b"HTTP/1.0 200 OK\r\n\r\n" + data) as (url, requests):
        assert fetch_image(f" {url}{path} ").size == (24, 20)
    assert requests[0].split()[1] == sent


def test_passing_errors_are_tried_again_and_others_are_not(server):
    assert fetch_image(server.url + "second_time").size == (24, 20)
    assert server.requests["second_time"] == 2
    for name, tries in (("always_500", 3), ("missing", 1), ("text", 1)):
        before = server.requests[name]
        with pytest.raises(ImageError):
            fetch_image(server.url + name, retries=2)
        assert server.requests[name] - before == tries


def test_redirects_are_followed(server):
    assert fetch_image(server.url + "to_rgb").size == (24, 20)
    assert all(agent.startswith("minimagen_fast/") for agent in server.agents)


@pytest.mark.parametrize("url", ["file:///etc/hostname", "ftp://host/x", "data:image/png;base64,", "", "x", None, 5])
def test_only_http_is_fetched(url):
    with pytest.raises(ImageError) as caught:
        fetch_image(url)
    assert caught.value.reason == "scheme"


@pytest.mark.parametrize("url, reason", [("http://127.0.0.1:1/x", "network"), ("http://[::1", "scheme")])
def test_nobody_there(url, reason):
    with pytest.raises(ImageError) as caught:
        fetch_image(url, retries=0)
    assert caught.value.reason == reason


def test_transparent_pixels_are_white():
    clear = Image.new("RGBA", (4, 4), (255, 0, 0, 0))
    assert decode_image(encoded(clear)).getpixel((0, 0)) == (255, 255, 255)


def test_sixteen_bits_keep_their_range():
    values = np.asarray(decode_image(encoded(picture("I;16"))))[..., 0]
    assert values.min() == 0 and values.max() == 255 and 100 < np.median(values) < 155


def test_what_pil_would_hand_to_another_program_is_no_image():
    with pytest.raises(ImageError) as caught:
        decode_image(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\n%%EOF\n")
    assert caught.value.reason == "not_an_image"


def test_any_damage_is_an_image_error():
    rng = np.random.default_rng(0)
    for data in GOOD.values():
        for _ in range(40):
            damaged = bytearray(data)
            for place in rng.integers(0, len(data), 4):
                damaged[place] = rng.integers(256)
            try:
                assert decode_image(bytes(damaged), max_pixels=10_000).mode == "RGB"
            except ImageError as error:
                assert error.reason in ("truncated", "not_an_image", "too_large")


@pytest.mark.parametrize("kind", ["PNG", "TIFF"])
@pytest.mark.parametrize("orientation", range(1, 10))
def test_a_cameras_orientation_is_obeyed(kind, orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    content = encoded(picture(size=(5, 3)), kind, exif=exif)
    with Image.open(io.BytesIO(content)) as image:
        expected = ImageOps.exif_transpose(image)
    decoded = decode_image(content)
    assert decoded.size == ((3, 5) if 5 <= orientation <= 8 else (5, 3))
    assert decoded.tobytes() == expected.tobytes()


@pytest.mark.parametrize(
    "exif, size",
    [
        (b"garbage!", (24, 20)),
        # Orientation 6, and a unit of resolution that is no number: what PIL reads, but cannot write.
        (
            bytes.fromhex("49492a00 08000000 0200 1201 0300 01000000 06000000 2801 0200 02000000 32000000 00000000"),
            (20, 24),
        ),
    ],
    ids=["garbage", "a unit that is no number"],
)
def test_odd_exif_loses_no_picture(exif, size):
    assert decode_image(encoded(picture(size=(24, 20)), exif=exif)).size == size


def test_a_line_of_pixels_is_too_large():
    with pytest.raises(ImageError) as caught:
        decode_image(encoded(Image.new("1", (1, 65_536))))
    assert caught.value.reason == "too_large"
    assert decode_image(encoded(Image.new("1", (65_535, 1)))).size == (65_535, 1)
