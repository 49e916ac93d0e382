"""What the tests of the web page share: a real server in a process of its own, and a headless browser to drive."""

from __future__ import annotations

import base64
import importlib.util
import json
import os
import re
import select
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import soundfile
import torch

import dualcodec_ext as dx
from dualcodec_ext._cli.codec import open_codec
from dualcodec_ext._cli.options import ModelOptions

RATE_HZ, HOP, CODEBOOKS = 24000, 480, 10
PIXELS_PER_S = 120  # of the pictures, as long as a clip fits
LSB = 1 / 32768
# A sample's distance from the offline round trip: half a step of rounding, and half a step if 32767 is the full scale,
# before the float's own error.
WORST = 2 * LSB

Samples, Pixels = npt.NDArray[np.int16], npt.NDArray[np.uint32]

CHROMIUM, DRIVER = Path("/usr/bin/chromium"), Path("/usr/bin/chromedriver")
PATIENCE_S = 90  # of a wait that should be short; nothing is measured by it
SWITCHES = (
    "headless",
    "no-sandbox",
    "disable-gpu",
    "disable-quic",
    "no-first-run",
    "disable-background-networking",
    "disable-component-update",
    "disable-sync",
    "use-fake-device-for-media-stream",
)


def why_not() -> str | None:
    """Why no browser can be driven here; None where one can."""
    missing = [str(path) for path in (CHROMIUM, DRIVER) if not path.exists()]
    missing += [f"the package {name}" for name in ("selenium", "aiohttp") if importlib.util.find_spec(name) is None]
    return f"not run: {' and '.join(missing)} missing (make browser; pip install '.[test]')" if missing else None


class Server:
    """A server of the model tiny on a port of its own."""

    def __init__(self, *options: str) -> None:
        command = [sys.executable, "-m", "dualcodec_ext", "serve", "--port", "0", *options]
        self.process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=False)
        self.said = ""
        self.url = self._listen()

    def _listen(self) -> str:
        """Reads what the server says until it says where it is."""
        assert self.process.stdout is not None
        end = time.monotonic() + PATIENCE_S
        while time.monotonic() < end:
            if select.select([self.process.stdout], [], [], 0.2)[0]:
                part = os.read(self.process.stdout.fileno(), 4096)
                self.said += part.decode()
                if found := re.search(r"http://127\.0\.0\.1:\d+", self.said):
                    return found[0]
                if not part:
                    break
        self.stop()
        raise AssertionError(f"the server did not start: {self.said}")

    def stop(self) -> None:
        """Ends it as a terminal would."""
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
        try:
            self.process.wait(PATIENCE_S)
        finally:
            self.process.kill()
            if self.process.stdout is not None:
                self.process.stdout.close()


class Page:
    """The page in a browser of its own, whose microphone hears a file again and again."""

    def __init__(self, folder: Path, microphone: Path, *switches: str) -> None:
        from selenium import webdriver

        options = webdriver.ChromeOptions()
        options.binary_location = str(CHROMIUM)
        options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
        own = (f"user-data-dir={folder / 'profile'}", f"use-file-for-fake-audio-capture={microphone}")
        for switch in (*SWITCHES, *own, *switches):
            options.add_argument(f"--{switch}")
        self.driver = webdriver.Chrome(options=options, service=webdriver.ChromeService(str(DRIVER)))
        self.driver.set_script_timeout(PATIENCE_S)
        self.downloads = folder / "downloads"
        self.driver.execute_cdp_cmd(
            "Browser.setDownloadBehavior", {"behavior": "allow", "downloadPath": str(self.downloads)}
        )
        self.look(1180, 1000, "dark")

    def look(self, width: int, height: int, scheme: str) -> None:
        """Sets the page's size in CSS pixels and the colours that are preferred."""
        size = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": False}
        self.driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
        wanted = [{"name": "prefers-color-scheme", "value": scheme}]
        self.driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": wanted})

    def open(self, url: str) -> None:
        self.driver.get(url)
        self.wait(lambda: "frames/s" in self.text("model"), "what the server runs")

    def run(self, script: str, *arguments: Any) -> Any:
        return self.driver.execute_script(script, *arguments)

    def run_async(self, script: str, *arguments: Any) -> Any:
        """Runs the body of an async function in the page, and gives what it returns."""
        wrapped = (
            "const done = arguments[arguments.length - 1];"
            f"(async (...args) => {{ {script} }})(...arguments)"
            ".then((x) => done([x, null]), (e) => done([null, String(e)]));"
        )
        value, error = self.driver.execute_async_script(wrapped, *arguments)
        assert error is None, error
        return value

    def element(self, selector: str) -> Any:
        return self.driver.find_element("css selector", selector)

    def text(self, name: str) -> str:
        return str(self.run("return document.getElementById(arguments[0]).textContent", name))

    @property
    def state(self) -> str:
        return str(self.run("return document.body.dataset.state"))

    def wait(self, condition: Any, what: str) -> None:
        end = time.monotonic() + PATIENCE_S
        while not condition():
            assert time.monotonic() < end, f"waited for {what}; the page says: {self.state}, {self.text('error')}"
            time.sleep(0.05)

    def wait_for(self, state: str) -> None:
        """Waits for a state; an error that is not awaited ends the test at once."""
        self.wait(lambda: self.state in (state, "error"), state)
        assert self.state == state, self.text("error")

    def settle(self) -> None:
        """Waits until the pictures have been drawn again."""
        self.run_async("for (let i = 0; i < 8; i++) await new Promise(requestAnimationFrame);")

    def choose(self, **radios: str) -> None:
        for name, value in radios.items():
            self.element(f'input[name="{name}"][value="{value}"]').click()

    def send(self, path: Path, pace: str = "fast") -> None:
        """Presses Start for a file."""
        self.choose(source="file", pace=pace)
        self.element("#file").send_keys(str(path))
        self.element("#start").click()

    def send_codes(self, path: Path) -> None:
        self.choose(source="codes", pace="fast")
        self.element("#codes-file").send_keys(str(path))
        self.element("#start").click()

    def picture(self, name: str) -> Pixels:
        """The pixels of a canvas, [height, width], a colour each."""
        script = """
        const canvas = document.getElementById(arguments[0]);
        const { data, width, height } = canvas.getContext("2d").getImageData(0, 0, canvas.width, canvas.height);
        let text = "";
        for (let i = 0; i < data.length; i += 32768) text += String.fromCharCode(...data.subarray(i, i + 32768));
        return [btoa(text), height, width];
        """
        text, height, width = self.run(script, name)
        return np.frombuffer(base64.b64decode(text), np.uint32).reshape(height, width)

    def download(self, button: str, name: str) -> Path:
        """Presses a button of the downloads, and waits for its file."""
        path = self.downloads / name
        path.unlink(missing_ok=True)
        self.element(f"#{button}").click()
        # An empty file holds its name until it is whole.
        self.wait(lambda: path.exists() and path.stat().st_size > 0, name)
        return path

    def results(self) -> dict[str, Any]:
        """All that the page gives: sent and result [samples] int16, codes [codebooks, frames], the JSON."""
        found: dict[str, Any] = {}
        for side, button in (("sent", "save-in"), ("result", "save-out")):
            samples, rate = soundfile.read(self.download(button, f"dualcodec-{side}.wav"), dtype="int16")
            assert rate == 24000 and samples.ndim == 1
            found[side] = samples
        found["json"] = json.loads(self.download("save-json", "dualcodec-codes.json").read_text())
        found["codes"] = np.array(found["json"]["codes"], dtype=np.int64)
        plain = np.fromfile(self.download("save-binary", "dualcodec-codes.bin"), "<u2")
        assert np.array_equal(plain.reshape(-1, found["json"]["codebooks"]).T, found["codes"])
        return found

    def complaints(self) -> list[str]:
        """What the browser's console holds against the page."""
        return [entry["message"] for entry in self.driver.get_log("browser") if entry["level"] == "SEVERE"]


@contextmanager
def opened(folder: Path, microphone: Path, *switches: str) -> Iterator[Page]:
    page = Page(folder, microphone, *switches)
    try:
        yield page
    finally:
        page.driver.quit()


needs_browser = pytest.mark.skipif(why_not() is not None, reason=why_not() or "")


class Offline:
    """The package's own encode and decode of whole clips, on tiny."""

    def __init__(self) -> None:
        self.codec = open_codec(ModelOptions("tiny"), None)

    def roundtrip(self, samples: Samples, codebooks: int) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.float32]]:
        """Codes [codebooks, F] and audio [S]."""
        model = self.codec.model
        assert isinstance(model, dx.DualCodec)
        audio = torch.from_numpy(samples.astype(np.float32) / 32768)[None, None]
        semantic, acoustic = model.encode(audio, codebooks)
        codes = semantic if acoustic is None else torch.cat([semantic, acoustic], 1)
        return codes[0].numpy(), model.decode_from_codes(semantic, acoustic)[0, 0].numpy()


def check_results(page: Page, offline: Offline, codebooks: int) -> dict[str, Any]:
    """That codes and audio are those of exactly the samples that were sent, and that the page counts them right."""
    found = page.results()
    sent, result, codes = found["sent"], found["result"], found["codes"]
    frames = -(-len(sent) // HOP)
    assert codes.shape == (codebooks, frames) and len(result) == frames * HOP
    assert found["json"]["frames"] == frames and found["json"]["samples_sent"] == len(sent)
    assert page.text("frames") == str(frames) and page.text("dropped") == "0"
    wanted_codes, wanted = offline.roundtrip(sent, codebooks)
    assert np.array_equal(codes, wanted_codes)
    check_audio(result, wanted)
    for name in ("latency", "latency-median", "latency-p95"):
        assert float(page.text(name)) > 0
    return found


def check_audio(result: Samples, wanted: npt.NDArray[np.float32]) -> None:
    assert len(result) == len(wanted)
    assert np.abs(result * LSB - np.clip(wanted, -1, 1)).max() <= WORST


def codes_json(model: str, rows: list[list[int]]) -> str:
    """As the page writes codes, as far as it reads them again."""
    return json.dumps({"format": "dualcodec-ext live codes", "model": {"name": model}, "codes": rows})


def wrong_codes(whole: bytes) -> list[tuple[str, bytes, str]]:
    """Names and contents of files that hold no codes for tiny, made from a whole code file, and what the page says."""
    of_another, out_of_range = codes_json("12hz_v1", []), codes_json("tiny", [[1, 2], [3, 1024]])
    return [
        ("copy.json", b"{}", "is no code file, nor JSON of this page"),
        ("copy.json", of_another.encode(), "is of the model 12hz_v1, the server runs tiny"),
        ("copy.json", out_of_range.encode(), "has a code out of range at codebook 2, frame 2"),
        ("text.safetensors", b"no codes at all", "is no code file"),
        *((f"{n}.safetensors", whole[:n], "is cut short or damaged") for n in (100, 1500, len(whole) - 1)),
    ]


def ground(picture: Pixels) -> np.uint32:
    """The colour of most pixels."""
    values, counts = np.unique(picture, return_counts=True)
    return np.uint32(values[counts.argmax()])


def drawn(picture: Pixels, seconds: float) -> float:
    """The share of pixels that are not the ground, in the first seconds."""
    return float((picture[:, : int(seconds * PIXELS_PER_S)] != ground(picture)).mean())


def check_wave(picture: Pixels, samples: Samples, louder_than: int) -> None:
    """That two seconds of a waveform are as high as their samples are loud."""
    # 10 ms are 1.2 pixels, so every fifth stretch has a pixel to itself.
    peaks = np.ptp(samples[: 2 * RATE_HZ].reshape(-1, RATE_HZ // 100).astype(float), axis=1)[::5]
    picture = picture[:, : 2 * PIXELS_PER_S : 6]
    heights = (picture != ground(picture)).sum(0)
    wave = heights < picture.shape[0]  # the playhead is as high as the picture
    assert wave.sum() >= 38 and peaks.max() > louder_than
    # A pixel that is covered in part, at the top and at the bottom, is drawn too.
    assert np.abs(heights - peaks * LSB * picture.shape[0] / 2 - 1)[wave].max() <= 2


def brightness(picture: Pixels) -> npt.NDArray[np.float64]:
    return sum((picture >> shift & 255).astype(float) for shift in (0, 8, 16))  # type: ignore[return-value]


def error(page: Page) -> tuple[str, str]:
    """Waits for an error; its code and its one line."""
    page.wait(lambda: page.state == "error", "an error")
    line = page.element("#error")
    assert line.is_displayed() and line.get_attribute("role") == "alert" and "\n" not in line.text
    return str(line.get_attribute("data-code")), line.text
