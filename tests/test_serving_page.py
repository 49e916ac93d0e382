"""The web page of `serve` in a headless browser: what it sends, gets, plays, draws and says."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import soundfile
from page import (
    CODEBOOKS,
    HOP,
    LSB,
    PIXELS_PER_S,
    RATE_HZ,
    Offline,
    Page,
    Server,
    brightness,
    check_audio,
    check_results,
    check_wave,
    codes_json,
    drawn,
    error,
    needs_browser,
    opened,
    wrong_codes,
)
from test_cli import SMALL

from dualcodec_ext._cli.voice import vowels
from dualcodec_ext.codes import write_codes

pytestmark = needs_browser


@pytest.fixture(scope="module")
def speech(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two seconds and a part of a frame."""
    path = tmp_path_factory.mktemp("audio") / "speech.wav"
    soundfile.write(path, vowels("aeioua").samples[: 2 * RATE_HZ + 123], RATE_HZ, subtype="PCM_16")
    return path


@pytest.fixture(scope="module")
def silence(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("audio") / "silence.wav"
    soundfile.write(path, np.zeros(2 * RATE_HZ), RATE_HZ, subtype="PCM_16")
    return path


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    server = Server()
    yield server
    server.stop()


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory, speech: Path) -> Iterator[Page]:
    with opened(tmp_path_factory.mktemp("browser"), speech, "use-fake-ui-for-media-stream") as page:
        yield page


@pytest.fixture
def page(browser: Page, server: Server) -> Iterator[Page]:
    browser.complaints()
    browser.look(1180, 1000, "dark")
    browser.open(server.url)
    yield browser
    assert browser.complaints() == []


@pytest.fixture(scope="module")
def offline() -> Offline:
    return Offline()


# What is sent and what comes back -------------------------------------------------------------------------------------


def test_a_file_gives_the_codes_and_audio_of_the_offline_roundtrip(page: Page, speech: Path, offline: Offline) -> None:
    page.send(speech)
    page.wait_for("ended")
    found = check_results(page, offline, CODEBOOKS)
    assert np.array_equal(found["sent"], soundfile.read(speech, dtype="int16")[0])
    assert found["json"]["model"]["name"] == "tiny" and found["json"]["model"]["sample_rate"] == RATE_HZ
    assert page.text("bitrate") == "5.05"  # 50 * (11 + 9 * 10) bits


def test_a_file_in_real_time_is_played_to_its_end(page: Page, speech: Path, offline: Offline, tmp_path: Path) -> None:
    def head() -> int:
        """Where the playhead stands: the one full column of the picture."""
        full = (page.picture("wave-out") == np.uint32(0xFFFFFFFF)).all(0)
        return int(full.argmax()) if full.any() else -1

    soundfile.write(tmp_path / "long.wav", np.tile(soundfile.read(speech)[0], 3), RATE_HZ)  # six seconds
    page.send(tmp_path / "long.wav", "paced")
    page.wait(lambda: head() > 0, "playback")
    assert page.state == "live"  # it is played while it arrives
    page.wait_for("ended")
    found = check_results(page, offline, CODEBOOKS)
    end = len(found["result"]) / RATE_HZ * PIXELS_PER_S
    page.wait(lambda: abs(head() - end) <= 2, "the end of playback")
    assert page.text("queued") == "0"


def test_fewer_codebooks_by_the_keyboard(page: Page, speech: Path, offline: Offline) -> None:
    from selenium.webdriver.common.keys import Keys

    page.element("#codebooks").send_keys(Keys.HOME, Keys.ARROW_RIGHT, Keys.ARROW_RIGHT)
    assert re.match(r"3 of 10 · 1\.55 kbit/s", page.text("codebooks-say"))
    page.choose(source="file", pace="fast")
    page.element("#file").send_keys(str(speech))
    page.element("#codebooks").send_keys(Keys.ENTER)  # a form's own way to start
    page.wait_for("ended")
    check_results(page, offline, 3)
    assert page.text("bitrate") == "1.55"


def test_the_microphone(page: Page, speech: Path, offline: Offline) -> None:
    assert page.element("#mute").is_selected()  # loudspeakers would feed back
    page.element("#start").click()
    page.wait_for("live")
    page.wait(lambda: int(page.text("frames")) >= 100, "two seconds")
    live = {name: page.picture(name) for name in PICTURES}
    page.element("#start").click()
    page.wait_for("ended")
    found = check_results(page, offline, CODEBOOKS)

    # Drawn while it came, and in the end what was heard and made of it.
    for name, least in zip(PICTURES, (0.05, 0.3, 0.6, 0.3, 0.04, 0.03), strict=True):
        assert drawn(live[name], 1.5) > least, name
    page.settle()
    check_wave(page.picture("wave-in"), found["sent"], 500)
    check_wave(page.picture("wave-out"), found["result"], 500)

    # The microphone hears the file from anywhere in it, resampled on the way, again and again, with gaps where this
    # machine was busy: so most quarters of a second are found in it.
    size = 4 * RATE_HZ
    looped = np.tile(soundfile.read(speech)[0], 3)[:size]
    quarters = (found["sent"][: 2 * RATE_HZ] * LSB).reshape(8, -1)
    spectra = np.fft.rfft(looped) * np.fft.rfft(quarters, size).conj()
    matches = np.fft.irfft(spectra)[:, : size - RATE_HZ // 4]
    energy = np.convolve(looped**2, np.ones(RATE_HZ // 4), "valid")[: matches.shape[1]]
    alike = (matches / np.sqrt(energy)).max(1) / np.linalg.norm(quarters, axis=1)
    assert (alike > 0.9).sum() >= 4, alike


def test_codes_of_a_code_file_and_of_the_page_itself(
    page: Page, speech: Path, tmp_path: Path, offline: Offline
) -> None:
    samples = soundfile.read(speech, dtype="int16")[0]
    made = offline.codec.encode(samples.astype(np.float32) / 32768, RATE_HZ)
    path = tmp_path / "speech.codes.safetensors"
    write_codes(path, made)
    page.send_codes(path)
    page.wait_for("ended")
    codes, wanted = offline.roundtrip(samples, CODEBOOKS)
    assert page.text("frames") == str(codes.shape[1]) and page.text("dropped") == "0"
    assert not page.element("#save-in").is_displayed() and not page.element("#listen-in").is_displayed()
    check_audio(soundfile.read(page.download("save-out", "dualcodec-result.wav"), dtype="int16")[0], wanted)
    page.settle()
    assert drawn(page.picture("codes"), 2) > 0.8 and not page.element("#wave-in").is_displayed()

    saved = page.download("save-json", "dualcodec-codes.json")
    assert np.array_equal(json.loads(saved.read_text())["codes"], codes)
    copy = saved.rename(tmp_path / "copy.json")
    page.run("const x = document.getElementById('codebooks'); x.value = 3; x.dispatchEvent(new Event('input'));")
    page.send_codes(copy)
    page.wait(lambda: page.state == "ended" and page.text("bitrate") == "1.55", "the second stream")
    wanted = offline.roundtrip(samples, 3)[1]
    check_audio(soundfile.read(page.download("save-out", "dualcodec-result.wav"), dtype="int16")[0], wanted)

    for name, content, text in wrong_codes(path.read_bytes()):
        (tmp_path / name).write_bytes(content)
        page.send_codes(tmp_path / name)
        page.wait(lambda text=f"{name} {text}": text in page.text("error"), text)
        assert error(page)[0] == "codes" and page.text("frames") == "0" and page.element("#results").is_displayed()


# What is drawn --------------------------------------------------------------------------------------------------------

PICTURES = ("wave-in", "spectrogram-in", "codes", "spectrogram-out", "wave-out", "latencies")


def test_pictures_show_speech_and_silence(page: Page, speech: Path, silence: Path) -> None:
    page.settle()
    idle = {name: page.picture(name) for name in PICTURES}
    for name in PICTURES:
        assert drawn(idle[name], 2) < 0.03, name  # a middle line at most
    seen = {}
    for what, path in (("speech", speech), ("silence", silence)):
        page.send(path)
        page.wait_for("ended")
        page.settle()
        seen[what] = {name: page.picture(name) for name in PICTURES}
    loud, quiet = seen["speech"], seen["silence"]
    for name, least in zip(PICTURES, (0.1, 0.5, 0.8, 0.5, 0.05, 0.05), strict=True):
        assert drawn(loud[name], 2) > least, name
        assert (loud[name][:, :240] != quiet[name][:, :240]).mean() > 0.02, name
    assert drawn(quiet["wave-in"], 2) < 0.05 and drawn(quiet["spectrogram-in"], 1.5) < 0.001
    assert drawn(quiet["codes"], 2) > 0.8  # silence has codes too


def test_the_pictures_are_those_of_the_data(page: Page, speech: Path) -> None:
    page.send(speech)
    page.wait_for("ended")
    page.settle()
    found = page.results()

    # A colour per code and a code per colour, at each frame's and codebook's place.
    picture, codes = page.picture("codes"), found["codes"]
    rows = ((np.arange(CODEBOOKS) + 0.5) * picture.shape[0] / CODEBOOKS).astype(int)
    columns = ((np.arange(codes.shape[1]) + 0.5) * PIXELS_PER_S * HOP / RATE_HZ).astype(int)
    colors = picture[np.ix_(rows, columns)]
    pairs = set(zip(codes.ravel().tolist(), colors.ravel().tolist(), strict=True))
    assert len(pairs) == len({code for code, _ in pairs}) > 100
    assert len({color for _, color in pairs}) > 0.9 * len(pairs)

    for name, side in (("wave-in", "sent"), ("wave-out", "result")):
        check_wave(page.picture(name), found[side], 2000)

    # As bright as there is power: by quarters of an octave's band and a tenth of a second, below 4 kHz.
    for name, side in (("spectrogram-in", "sent"), ("spectrogram-out", "result")):
        picture = brightness(page.picture(name))
        samples = found[side][: 2 * RATE_HZ].astype(float) * LSB
        power = np.abs(np.fft.rfft(samples.reshape(20, -1) * np.hanning(2400), axis=1)) ** 2
        shown, wanted = [], []
        for low in (200, 400, 800, 1600, 2400, 3200):
            band = [low, 1.25 * low]
            y = [picture.shape[0] * (1 - np.log1p(hz / 700) / np.log1p(RATE_HZ / 1400)) for hz in band]
            stretch = picture[int(y[1]) : int(y[0]) + 1, : 20 * 12].mean(0)
            shown.append(stretch.reshape(20, 12).mean(1))
            wanted.append(10 * np.log10(power[:, int(low / 10) : int(band[1] / 10)].mean(1) + 1e-9))
        assert np.corrcoef(np.ravel(shown), np.ravel(wanted))[0, 1] > 0.8, name


def test_columns_of_a_spectrogram_are_where_and_as_strong_as_the_tone(page: Page) -> None:
    script = """
    const { Track } = await import(new URL("static/history.js", location.href));
    const track = new Track(24000);
    const tone = Int16Array.from({ length: 24000 }, (_, i) => 3276.8 * Math.sin(2 * Math.PI * args[0] * i / 24000));
    track.add(tone);
    const column = 50 * track.bands;
    return [[...track.levels.data.slice(column, column + track.bands)], track.height(args[0]), track.low.length];
    """
    for hz in (300, 1000, 3000, 9000):
        levels, height, columns = page.run_async(script, hz)
        best = int(np.argmax(levels))
        assert abs((best + 0.5) / len(levels) - height) < 1.5 / len(levels) and columns == 100
        # -20 dB, on a scale of 255 from -85 to -15 dB; a Hann window loses 1.4 dB half-way between bins.
        assert abs(max(levels) * 70 / 255 - 85 + 20) < 1.7
        assert np.median(levels) == 0


# What is counted ------------------------------------------------------------------------------------------------------


def test_latency_goes_by_a_frames_last_sample(page: Page) -> None:
    script = """
    const { Meter } = await import(new URL("static/stream.js", location.href));
    const meter = new Meter(480);
    const before = meter.summary();
    meter.sentSamples(479, 100); meter.sentSamples(1, 110); meter.sentSamples(960, 120); meter.sentSamples(5, 125);
    meter.receivedSamples(480, 130); meter.receivedSamples(100, 131); meter.receivedSamples(860, 150);
    meter.flushedAt = 160;
    meter.receivedSamples(480, 161);
    return [before, meter.latencies, meter.summary()];
    """
    before, latencies, summary = page.run_async(script)
    assert before is None and latencies == [20, 30, 30, 1]
    assert summary == {"now": 1, "median": 20, "p95": 30}


def test_playback_waits_for_its_pre_roll_and_counts_underruns(page: Page) -> None:
    script = """
    globalThis.AudioWorkletProcessor = class {
      constructor() { this.port = { postMessage: (x) => (this.said = x) }; }
    };
    let Playback;
    globalThis.registerProcessor = (name, made) => (Playback = made);
    await import(new URL("static/playback-worklet.js", location.href));
    const player = new Playback({ processorOptions: { prerollSamples: 200, mostSamples: 1000 } });
    const push = (n, value) => player.port.onmessage({ data: new Float32Array(n).fill(value) });
    const out = () => {
      const x = new Float32Array(128);
      const on = player.process([], [[x]]);
      return [x.filter((v) => v).length, on];
    };
    const seen = [out()];
    push(150, 1); seen.push(out());               // less than the pre-roll
    push(150, 1); seen.push(out(), out(), out()); // 300: 128, 128, 44 and an underrun
    push(150, 1); seen.push(out());               // waits for the pre-roll again
    push(1200, 1); seen.push(out());              // over the most: cut to the pre-roll, then 128
    player.port.onmessage({ data: "end" }); seen.push(out());
    const { underruns, skipped, played, said } = player;
    return [seen, underruns, skipped, played, said.over];
    """
    seen, underruns, skipped, played, over = page.run_async(script)
    assert [n for n, _ in seen] == [0, 0, 128, 128, 44, 0, 128, 72]
    assert [on for _, on in seen] == [True] * 7 + [False]
    assert underruns == 1 and skipped == 1350 - 200 and played == 300 + 200 and over


# What goes wrong ------------------------------------------------------------------------------------------------------


def test_a_full_server_a_server_that_ends_and_none(browser: Page, speech: Path) -> None:
    server = Server("--streams", "1")
    try:
        browser.open(server.url)
        hold = """
        const socket = (globalThis.held = new WebSocket(location.href.replace("http", "ws") + "v1/stream"));
        await new Promise((resolve) => (socket.onopen = resolve));
        socket.send(JSON.stringify({ task: "roundtrip" }));
        return JSON.parse(await new Promise((resolve) => (socket.onmessage = ({ data }) => resolve(data)))).type;
        """
        assert browser.run_async(hold) == "ready"
        browser.send(speech)
        code, line = error(browser)
        assert code == "full" and line.startswith("The server is full: ")
        assert browser.element("#start").text == "Start again" and not browser.element("#results").is_displayed()

        browser.run_async("held.close(); await new Promise((resolve) => (held.onclose = resolve));")

        def runs() -> bool:
            if browser.state == "error":
                browser.element("#start").click()  # the server may not have seen yet that the other one left
            return browser.state == "ended"

        browser.wait(runs, "a stream")
        assert not browser.element("#error").is_displayed()

        browser.choose(source="microphone")
        browser.element("#start").click()
        browser.wait_for("live")
        browser.wait(lambda: int(browser.text("frames")) >= 10, "ten frames")
        server.stop()
        code, line = error(browser)
        assert code in ("shutdown", "closed")
        assert browser.element("#results").is_displayed()  # what came before stays

        browser.element("#start").click()
        browser.wait(lambda: browser.element("#error").get_attribute("data-code") == "no_server", "no server")
        assert error(browser)[1].startswith("No server: no answer from 127.0.0.1")
        assert browser.text("frames") == "0" and browser.element("#results").is_displayed()
    finally:
        server.stop()


def test_a_file_that_is_no_recording_and_none(page: Page, tmp_path: Path) -> None:
    page.choose(source="file")
    page.element("#start").click()
    assert error(page) == ("file", "No recording: choose a file first.")
    path = tmp_path / "text.wav"
    path.write_text("no samples")
    page.send(path)
    page.wait(lambda: "text.wav" in page.text("error"), "the second error")
    assert error(page) == ("file", "No recording: text.wav is no recording that this browser can read.")


def test_a_microphone_that_is_denied(server: Server, speech: Path, tmp_path: Path) -> None:
    with opened(tmp_path, speech, "deny-permission-prompts") as page:
        page.open(server.url)
        page.element("#start").click()
        code, line = error(page)
        assert code == "microphone" and line.startswith("No microphone: the browser or you denied it")


def test_a_model_that_can_only_decode_live(browser: Page, speech: Path, tmp_path: Path) -> None:
    path = tmp_path / "small.json"
    path.write_text(json.dumps(SMALL))
    server = Server("--model", str(path))
    try:
        browser.open(server.url)
        assert re.search(r"looks \d+ ms ahead · decodes codes alone$", browser.text("model"))
        assert browser.element('input[value="codes"]').is_selected()
        (tmp_path / "codes.json").write_text(codes_json("small", [[*range(20)]]))
        browser.send_codes(tmp_path / "codes.json")
        browser.wait_for("ended")
        assert browser.text("frames") == "20"
        browser.send(speech)
        assert error(browser)[0] == "unsupported"
    finally:
        server.stop()


# How it looks to whom -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("scheme", ["dark", "light"])
def test_it_fits_a_phone_and_can_be_read(page: Page, speech: Path, scheme: str) -> None:
    page.look(360, 800, scheme)
    page.send(speech)
    page.wait_for("ended")
    assert page.run("return document.documentElement.scrollWidth <= innerWidth")
    contrasts = page.run(
        """
        const parse = (text) => text.match(/[\\d.]+/g).map(Number);
        const light = ([r, g, b]) => {
          const [x, y, z] = [r, g, b].map((c) => (c /= 255) <= 0.04045 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4);
          return 0.2126 * x + 0.7152 * y + 0.0722 * z;
        };
        const behind = (node) => {
          for (; node; node = node.parentElement) {
            const color = parse(getComputedStyle(node).backgroundColor);
            if (color.length === 3 || color[3] > 0) return color;
          }
        };
        const found = {};
        const texts = "h1, h2, p, label, legend, output, dt, dd, small, button, figcaption";
        for (const node of document.querySelectorAll(texts)) {
          if (!node.textContent.trim() || !node.checkVisibility()) continue;
          const [a, b] = [light(parse(getComputedStyle(node).color)), light(behind(node))];
          found[node.id || node.className || node.textContent] = (Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05);
        }
        return found;
        """
    )
    assert len(contrasts) > 25
    assert {name: ratio for name, ratio in contrasts.items() if ratio < 4.5} == {}


def test_every_control_has_a_name_and_the_keyboard_reaches_it(page: Page) -> None:
    from selenium.webdriver.common.keys import Keys

    nameless = """
    return [...document.querySelectorAll("input, select, button, canvas, audio")].filter((node) =>
      !(node.labels?.length || node.getAttribute("aria-label") || node.textContent.trim() ||
        document.querySelector(`label[for="${node.id}"]`))).map((node) => node.outerHTML);
    """
    assert page.run(nameless) == []
    page.run("document.activeElement.blur()")
    reached = []
    for _ in range(6):
        page.driver.switch_to.active_element.send_keys(Keys.TAB)
        reached.append(page.run("return document.activeElement.id || document.activeElement.name"))
    assert reached == ["source", "echo", "codebooks", "mute", "preroll", "start"]


def test_it_asks_nobody_else(page: Page, server: Server) -> None:
    names = page.run("return performance.getEntriesByType('resource').map((entry) => entry.name)")
    assert names and all(name.startswith(server.url) for name in names)
    policy = page.element('meta[http-equiv="Content-Security-Policy"]').get_attribute("content")
    assert policy.startswith("default-src 'none'") and "unsafe" not in policy
