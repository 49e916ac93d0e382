// Where samples and codes come from: the microphone, or a file.

import { loadWorklet, StreamError } from "./stream.js";

const BACKLOG_BYTES = 64 * 1024; // a file waits when the network holds this much
const LIVE_BACKLOG_S = 1; // a microphone can't wait: its pieces are dropped then
const AHEAD_S = 1; // how far a file runs ahead of the result, so that stopping is quick
const FAST_PIECE_S = 0.2;

const sleep = (ms) => new Promise((resolve) => setTimeout(resolve, ms));

/** 16-bit samples, as the wire has them: what Chromium made floats of, 1 for 32767 and -1 for -32768, comes back. */
export function toInt16(x) {
  const samples = new Int16Array(x.length);
  for (let i = 0; i < x.length; i++) {
    samples[i] = Math.max(-32768, Math.min(32767, Math.round(x[i] * (x[i] < 0 ? 32768 : 32767))));
  }
  return samples;
}

/** Asks for the microphone; a StreamError says why there is none. */
export async function openMicrophone(echoCancellation) {
  if (!navigator.mediaDevices?.getUserMedia) {
    throw new StreamError("microphone", "browsers give the microphone to pages from this machine or over HTTPS only");
  }
  try {
    return await navigator.mediaDevices.getUserMedia({
      audio: { channelCount: 1, echoCancellation, noiseSuppression: false, autoGainControl: false },
    });
  } catch (error) {
    const why = {
      NotAllowedError: "the browser or you denied it; allow it in the address bar and start again",
      NotFoundError: "there is none on this machine",
      NotReadableError: "another program holds it",
    };
    throw new StreamError("microphone", why[error.name] ?? error.message);
  }
}

/** Sends what a microphone hears until stop() or the device goes. */
export class Microphone {
  constructor(media) {
    this.media = media;
    this.dropped = 0; // frames that the network did not take in time
    this.stopped = false;
  }

  /** Starts, and gives each piece to send(); settles after the last one. */
  async run(context, stream, model, send) {
    const { hop_samples: hop, sample_rate: rate } = model;
    let source;
    try {
      source = context.createMediaStreamSource(this.media);
    } catch {
      throw new StreamError("microphone", `this browser cannot bring it to ${rate} Hz: take another one, or a file`);
    }
    await loadWorklet(context, "capture-worklet.js");
    if (this.stopped) return;
    this.node = new AudioWorkletNode(context, "capture", {
      numberOfOutputs: 0,
      channelCount: 1,
      channelCountMode: "explicit",
      processorOptions: { pieceSamples: hop },
    });
    const done = new Promise((resolve) => {
      this.node.port.onmessage = ({ data: { piece, last } }) => {
        if (stream.backlog > LIVE_BACKLOG_S * rate * 2) this.dropped += piece.length === hop ? 1 : 0;
        else if (piece.length) send(piece);
        if (last) resolve();
      };
    });
    for (const track of this.media.getTracks()) track.onended = () => this.stop();
    source.connect(this.node);
    await done;
    source.disconnect();
  }

  stop() {
    if (this.stopped) return; // the worklet would give its last piece again
    this.stopped = true;
    this.node?.port.postMessage("stop");
    for (const track of this.media.getTracks()) track.stop();
  }
}

/** Reads a recording at the model's rate, its channels averaged. */
export async function readFile(file, rate) {
  let audio;
  try {
    audio = await new OfflineAudioContext(1, 1, rate).decodeAudioData(await file.arrayBuffer());
  } catch {
    throw new StreamError("file", `${file.name} is no recording that this browser can read`);
  }
  const mono = audio.getChannelData(0);
  const channels = audio.numberOfChannels;
  for (let c = 1; c < channels; c++) audio.getChannelData(c).forEach((x, i) => (mono[i] += x));
  if (channels > 1) for (let i = 0; i < mono.length; i++) mono[i] /= channels;
  return toInt16(mono);
}

/** Sends what is stored, samples or codes, in real time or as fast as network and server take it. */
export class Stored {
  constructor(values, perFrame, paced) {
    this.values = values;
    this.perFrame = perFrame;
    this.paced = paced;
    this.dropped = 0; // a file waits instead
    this.stopped = false;
  }

  async run(context, stream, model, send) {
    const { sample_rate: rate, frame_rate: frameRate, latency_ms: lookaheadMs } = model;
    const frames = this.paced ? 1 : Math.max(1, Math.round(FAST_PIECE_S * frameRate));
    const ahead = rate * (AHEAD_S + lookaheadMs / 1000 + frames / frameRate);
    const size = frames * this.perFrame;
    const start = performance.now();
    for (let at = 0; at < this.values.length; at += size) {
      // A piece is there once its last sample has been spoken.
      const due = start + ((at + size) / this.perFrame) * (1000 / frameRate);
      if (this.paced && due > performance.now()) await sleep(due - performance.now());
      while (!this.stopped && !stream.over && this.mustWait(stream, ahead)) await sleep(5);
      if (this.stopped || stream.over) return;
      send(this.values.subarray(at, at + size));
    }
  }

  mustWait(stream, ahead) {
    if (stream.backlog > BACKLOG_BYTES) return true;
    return !this.paced && stream.meter.sent - stream.meter.received > ahead;
  }

  stop() {
    this.stopped = true;
  }
}
