// The page: what is chosen, in which state it is, and what it shows.

import { codesBinary, codesJson, readCodes, save, wav } from "./files.js";
import { Codes, Track } from "./history.js";
import { Player } from "./player.js";
import { Microphone, openMicrophone, readFile, Stored } from "./sources.js";
import { Stream, StreamError } from "./stream.js";
import { Views } from "./views.js";

const $ = (id) => document.getElementById(id);
const FIGURES_EVERY_MS = 200;
const still = window.matchMedia("(prefers-reduced-motion: reduce)");

// What an error's code means here; the server's own line follows.
const MEANINGS = {
  full: "The server is full",
  bad_request: "The server refused the request",
  too_slow: "This page read too slowly, and the server dropped it",
  silent: "The server heard nothing for too long",
  too_large: "The server refused a message as too large",
  malformed: "The server could not read a message",
  unsupported: "The server’s model cannot do this",
  internal: "The server failed",
  shutdown: "The server is shutting down",
  no_server: "No server",
  closed: "The connection was lost",
  protocol: "The server does not speak this page’s protocol",
  microphone: "No microphone",
  file: "No recording",
  codes: "No codes",
  audio: "No audio device",
};

class App {
  constructor() {
    this.views = new Views();
    this.model = null;
    this.clip = null; // of the stream that runs, or of the last one that did
    this.counted = null; // the clip whose figures are shown: none where the last press of Start made no stream
    this.run = null; // what belongs to one press of Start
    this.follow = true;
    this.mutedByHand = false;
    this.drawnAt = 0;
    this.figuresAt = 0;
    this.setState("idle", "Ready.");
    $("controls").addEventListener("submit", (event) => {
      event.preventDefault();
      this.press();
    });
    for (const radio of document.querySelectorAll('input[name="source"]')) {
      radio.addEventListener("change", () => this.sourceChanged());
    }
    $("codebooks").addEventListener("input", () => this.showCodebooks());
    $("mute").addEventListener("change", () => {
      this.mutedByHand = true;
      this.run?.player?.mute($("mute").checked);
    });
    $("position").addEventListener("input", () => {
      this.follow = Number($("position").value) >= Number($("position").max);
    });
    this.wireDownloads();
    this.sourceChanged();
    this.askModel();
    requestAnimationFrame((now) => this.tick(now));
  }

  get source() {
    return document.querySelector('input[name="source"]:checked').value;
  }

  // What the server runs ---------------------------------------------------------------------------------------------

  async askModel() {
    try {
      const answer = await fetch(new URL("v1/info", location.href));
      if (!answer.ok) throw new Error(`status ${answer.status}`);
      this.adopt(await answer.json());
    } catch {
      $("model").textContent = `no answer from ${location.host} yet`;
    }
  }

  adopt(model) {
    const first = this.model === null;
    this.model = model;
    const { name, sample_rate: rate, frame_rate: frames, codebook_sizes: sizes, latency_ms: latency } = model;
    const { tasks = ["roundtrip"] } = model;
    const ahead = latency ? `looks ${Math.round(latency)} ms ahead` : "no look-ahead";
    $("model").textContent =
      `${name} · ${rate / 1000} kHz · ${round(frames, 2)} frames/s · ${sizes.length} codebooks · ${ahead}` +
      (tasks.includes("roundtrip") ? "" : " · decodes codes alone");
    if (first && !tasks.includes("roundtrip")) {
      document.querySelector('input[name="source"][value="codes"]').checked = true;
      this.sourceChanged();
    }
    $("codebooks").max = sizes.length;
    if (first) $("codebooks").value = sizes.length;
    this.showCodebooks();
  }

  showCodebooks() {
    if (!this.model) return;
    const { codebook_sizes: sizes, sample_rate: rate } = this.model;
    const count = Number($("codebooks").value);
    const kbps = this.bitrate(count);
    const times = Math.round((16 * rate) / 1000 / kbps);
    $("codebooks-say").textContent = `${count} of ${sizes.length} · ${kbps.toFixed(2)} kbit/s, 1/${times} of PCM`;
    if (!this.run) $("bitrate").textContent = kbps.toFixed(2);
  }

  bitrate(count) {
    const { codebook_sizes: sizes, frame_rate: frames } = this.model;
    return (frames * sizes.slice(0, count).reduce((bits, size) => bits + Math.log2(size), 0)) / 1000;
  }

  sourceChanged() {
    const { source } = this;
    const microphone = source === "microphone";
    for (const name of ["microphone", "file", "codes"]) {
      document.querySelector(`.for-${name}`).hidden = source !== name;
    }
    document.querySelector(".for-stored").hidden = microphone;
    $("mute-why").hidden = !microphone;
    if (!this.mutedByHand) $("mute").checked = microphone;
  }

  // States -----------------------------------------------------------------------------------------------------------

  setState(state, status) {
    document.body.dataset.state = state;
    const running = state === "connecting" || state === "live";
    $("start").textContent = running ? "Stop" : state === "idle" ? "Start" : "Start again";
    for (const id of ["sources", "codec", "preroll"]) $(id).disabled = running;
    $("status").textContent = status;
    if (state !== "error") $("error").hidden = true;
  }

  press() {
    const { run } = this;
    if (!run) this.start();
    else if (document.body.dataset.state === "live" && !run.stopping) {
      run.stopping = true;
      run.source.stop();
      $("status").textContent = "Stopping: the rest of the result comes in. Press again not to wait for it.";
    } else this.finish(run, "ended", "Stopped.");
  }

  async start() {
    const run = (this.run = { stopping: false });
    this.setState("connecting", "Connecting …");
    $("results").hidden = true;
    this.lastPlayer?.close();
    this.follow = true;
    this.counted = null;
    this.showFigures();
    try {
      await this.stream(run);
    } catch (error) {
      if (this.run !== run) return; // stopped meanwhile
      const known = error instanceof StreamError;
      if (!known) console.error(error);
      this.finish(run, "error", "Stopped by an error.", known ? error : new StreamError("page", error.message));
    }
  }

  async stream(run) {
    if (!this.model) await this.askModel();
    if (!this.model) throw new StreamError("no_server", `no answer from ${location.host}`);
    const { sample_rate: rate } = this.model;
    const live = this.source === "microphone";
    const task = this.source === "codes" ? "decode" : "roundtrip";
    // The audio device first: it needs the press of the button, and the server should not wait for it.
    run.context = new AudioContext({ sampleRate: rate, latencyHint: "interactive" });
    run.player = this.lastPlayer = new Player(run.context);
    run.codebooks = Number($("codebooks").value);
    run.source = await this.openSource(run);
    if (this.run !== run) {
      run.source.stop();
      return;
    }
    await run.player.start(Number($("preroll").value), $("mute").checked, live);
    if (this.run !== run) return;
    run.context.resume();

    const failed = new Promise((_, reject) => {
      run.stream = new Stream(streamUrl(), {
        codes: (codes) => run.clip.codes.add(codes),
        audio: (samples) => {
          run.clip.out.add(samples);
          run.player.play(samples);
        },
        failed: reject,
      });
    });
    failed.catch(() => {}); // heard below, but maybe later than it comes
    $("status").textContent = "Connecting …";
    const ready = await run.stream.open(task, run.codebooks);
    if (this.run !== run) return;
    if (ready.model.sample_rate !== rate) {
      throw new StreamError("protocol", "another model runs now: load the page again");
    }
    this.adopt(ready.model);
    this.clip = this.counted = run.clip = this.newClip(run, ready);
    document.body.dataset.task = task;
    this.showFigures();
    const what = { microphone: "speak", file: "a recording goes out and comes back", codes: "codes go, audio comes" };
    this.setState("live", `Live: ${what[this.source]}.`);

    const send = {
      roundtrip: (samples) => {
        run.stream.sendAudio(samples);
        run.clip.in.add(samples);
      },
      decode: (codes) => {
        run.stream.sendCodes(codes, run.codebooks);
        run.clip.codes.add(codes);
      },
    };
    await Promise.race([run.source.run(run.context, run.stream, ready.model, send[task]), failed]);
    if (this.run !== run) return;
    const { frames, samples } = await run.stream.flush();
    if (this.run !== run) return;
    if (frames !== run.clip.codes.frames || samples !== run.clip.out.samples) {
      throw new StreamError("protocol", `${frames} frames and ${samples} samples were sent, others came`);
    }
    this.finish(run, "ended", `Ended after ${run.clip.out.seconds.toFixed(1)} s.`);
  }

  // What the choice says, ready to be sent; a code file may have fewer codebooks than chosen.
  async openSource(run) {
    const { source, model } = this;
    if (source === "microphone") return new Microphone(await openMicrophone($("echo").checked));
    const [file] = $(source === "file" ? "file" : "codes-file").files;
    if (!file) throw new StreamError(source, "choose a file first");
    $("status").textContent = `Reading ${file.name} …`;
    const paced = document.querySelector('input[name="pace"]:checked').value === "paced";
    if (source === "file") return new Stored(await readFile(file, model.sample_rate), model.hop_samples, paced);
    const { codes, codebooks } = await readCodes(file, model, run.codebooks);
    run.codebooks = codebooks;
    return new Stored(codes, codebooks, paced);
  }

  newClip(run, { model, codebooks }) {
    return {
      model,
      in: new Track(model.sample_rate),
      out: new Track(model.sample_rate),
      codes: new Codes(codebooks, model.frame_rate),
      frameSeconds: 1 / model.frame_rate,
      meter: run.stream.meter,
      bitrate: this.bitrate(codebooks),
      source: run.source,
      player: run.player,
      get playedSeconds() {
        return (run.player.status.played + run.player.status.skipped) / model.sample_rate;
      },
    };
  }

  finish(run, state, status, error) {
    this.run = null;
    run.source?.stop();
    run.stream?.close();
    // What has come is played to its end, unless nothing has.
    if (run.clip?.out.samples) run.player.end();
    else run.player?.close();
    this.setState(state, status);
    if (error) {
      const meaning = MEANINGS[error.code] ?? "This page failed";
      $("error").textContent = `${meaning}: ${error.message}${/[.!?]$/.test(error.message) ? "" : "."}`;
      $("error").dataset.code = error.code;
      $("error").hidden = false;
    }
    this.showFigures();
    if (this.clip?.codes.frames) this.showResults();
  }

  // Pictures and figures ---------------------------------------------------------------------------------------------

  tick(now) {
    requestAnimationFrame((next) => this.tick(next));
    if (now - this.drawnAt < (still.matches ? 500 : 30)) return;
    this.drawnAt = now;
    const { clip, views } = this;
    const total = clip ? Math.max(clip.in.seconds, clip.out.seconds) : 0;
    const last = Math.max(0, total - views.span);
    const position = $("position");
    position.disabled = last === 0;
    position.max = last.toFixed(1);
    if (this.follow) position.value = this.followed(last);
    views.draw(clip, this.follow ? this.followed(last) : Number(position.value));
    if (now - this.figuresAt > FIGURES_EVERY_MS) {
      this.figuresAt = now;
      this.showFigures();
    }
  }

  // The newest samples, or once all of them are here what is being played.
  followed(last) {
    const { clip, run } = this;
    if (run || !clip || clip.player.status.over) return last;
    return Math.max(0, Math.min(last, clip.playedSeconds - this.views.span / 2));
  }

  showFigures() {
    const clip = this.counted;
    const latency = clip?.meter.summary();
    $("latency").textContent = milliseconds(latency?.now);
    $("latency-median").textContent = milliseconds(latency?.median);
    $("latency-p95").textContent = milliseconds(latency?.p95);
    if (clip) $("bitrate").textContent = clip.bitrate.toFixed(2);
    $("frames").textContent = clip?.codes.frames ?? 0;
    $("dropped").textContent = clip?.source.dropped ?? 0;
    const { queued, underruns } = clip?.player.status ?? { queued: 0, underruns: 0 };
    $("underruns").textContent = underruns;
    $("queued").textContent = clip ? Math.round((1000 * queued) / clip.model.sample_rate) : 0;
  }

  // What stays -------------------------------------------------------------------------------------------------------

  showResults() {
    const { clip } = this;
    // Codes that were sent have no samples.
    $("save-in").hidden = $("listen-in").parentElement.hidden = !clip.in.samples;
    for (const [side, id] of [["in", "listen-in"], ["out", "listen-out"]]) {
      URL.revokeObjectURL($(id).src);
      $(id).src = URL.createObjectURL(wav(clip[side].chunks, clip.model.sample_rate));
    }
    const cut = clip.in.kept < clip.in.samples || clip.out.kept < clip.out.samples;
    $("kept").textContent = cut ? "Audio is kept for the first 20 minutes alone; the codes are all here." : "";
    $("results").hidden = false;
  }

  wireDownloads() {
    const parts = {
      "save-out": ["result.wav", (clip) => wav(clip.out.chunks, clip.model.sample_rate)],
      "save-in": ["sent.wav", (clip) => wav(clip.in.chunks, clip.model.sample_rate)],
      "save-json": ["codes.json", (clip) => codesJson(clip.codes, clip.model, clip.in.samples)],
      "save-binary": ["codes.bin", (clip) => codesBinary(clip.codes)],
    };
    for (const [id, [name, make]] of Object.entries(parts)) {
      $(id).addEventListener("click", () => save(make(this.clip), `dualcodec-${name}`));
    }
  }
}

function streamUrl() {
  const url = new URL("v1/stream", location.href);
  url.protocol = location.protocol === "https:" ? "wss:" : "ws:";
  url.search = url.hash = "";
  return url.href;
}

const round = (x, digits) => Number(x.toFixed(digits));
const milliseconds = (x) => (x === undefined ? "–" : x < 10 ? x.toFixed(1) : x.toFixed(0));

new App();
