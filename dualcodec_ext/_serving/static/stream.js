// One stream of the server: the wire protocol, and what can be measured on it.

const PCM = 0x50;
const CODES = 0x43;
const READY_WITHIN_MS = 15000;
const FLUSHED_WITHIN_MS = 30000; // of silence, after a flush
const LATENCIES_KEPT = 3000; // for the percentiles: the last minute at 50 frames/s

/** Something that went wrong, with the protocol's code for it or one of our own. */
export class StreamError extends Error {
  constructor(code, message) {
    super(message);
    this.code = code;
  }
}

/** Loads a worklet that lies beside this file. */
export async function loadWorklet(context, name) {
  try {
    await context.audioWorklet.addModule(new URL(name, import.meta.url));
  } catch {
    throw new StreamError("no_server", `no answer from ${location.host}`);
  }
}

/** Tells when frames went out and when their audio came back. */
export class Meter {
  constructor(hopSamples) {
    this.hop = hopSamples;
    this.sent = 0;
    this.received = 0;
    this.framesOut = 0;
    this.leftAt = []; // [frame] ms, when its last sample was sent
    this.latencies = []; // [frame] ms
    this.flushedAt = 0;
  }

  sentSamples(count, now) {
    this.sent += count;
    while ((this.leftAt.length + 1) * this.hop <= this.sent) this.leftAt.push(now);
  }

  receivedSamples(count, now) {
    this.received += count;
    while ((this.latencies.length + 1) * this.hop <= this.received) {
      // The last frame may be one that the flush filled up.
      this.latencies.push(now - (this.leftAt[this.latencies.length] ?? this.flushedAt));
    }
  }

  /** Now, median and 95th percentile in ms; null before the first frame. */
  summary() {
    const recent = this.latencies.slice(-LATENCIES_KEPT);
    if (!recent.length) return null;
    const now = recent[recent.length - 1];
    recent.sort((a, b) => a - b);
    const at = (share) => recent[Math.ceil(share * recent.length) - 1];
    return { now, median: at(0.5), p95: at(0.95) };
  }
}

/**
 * A WebSocket to /v1/stream that speaks the protocol.
 *
 * `handlers`: codes(Uint16Array), audio(Int16Array), failed(StreamError), once at most and then nothing more.
 */
export class Stream {
  constructor(url, handlers) {
    this.url = url;
    this.handlers = handlers;
    this.over = false;
    this.meter = null;
    this.waiting = null; // { resolve, reject, type, timer } of the answer that is awaited
  }

  /** Connects and asks for a task; gives the server's `ready`. */
  open(task, codebooks) {
    const answer = this.await_("ready", READY_WITHIN_MS, "the server did not answer");
    let socket;
    try {
      socket = this.socket = new WebSocket(this.url);
    } catch (error) {
      this.fail(new StreamError("no_server", error.message));
      return answer;
    }
    let opened = false;
    socket.binaryType = "arraybuffer";
    socket.onopen = () => {
      opened = true;
      socket.send(JSON.stringify({ task, codebooks }));
    };
    socket.onmessage = ({ data }) => this.take(data);
    socket.onclose = ({ code, reason }) => {
      if (opened) this.fail(new StreamError("closed", reason || `the connection was closed (${code})`));
      else this.fail(new StreamError("no_server", `no answer from ${new URL(this.url).host}`));
    };
    return answer;
  }

  /** Bytes that the network has not taken yet. */
  get backlog() {
    return this.socket.bufferedAmount;
  }

  sendAudio(samples) {
    this.send(PCM, samples, samples.length);
  }

  /** Sends codes, `codebooks` of each frame. */
  sendCodes(codes, codebooks) {
    this.send(CODES, codes, (codes.length / codebooks) * this.meter.hop);
  }

  // `samples`: that the values stand for.
  send(kind, values, samples) {
    if (this.over) return;
    const message = new Uint8Array(2 + values.byteLength);
    message[0] = kind;
    message.set(new Uint8Array(values.buffer, values.byteOffset, values.byteLength), 2);
    this.socket.send(message);
    this.meter.sentSamples(samples, performance.now());
  }

  /** Ends the clip; gives the server's count once all of it is here. */
  flush() {
    const answer = this.await_("flushed", FLUSHED_WITHIN_MS, "the server did not finish the clip");
    if (this.over) return answer;
    this.meter.flushedAt = performance.now();
    this.socket.send(JSON.stringify({ type: "flush" }));
    return answer;
  }

  close() {
    this.over = true;
    this.settle(new StreamError("stopped", "stopped"));
    this.socket?.close(1000);
  }

  take(data) {
    if (this.over) return;
    if (typeof data === "string") this.takeText(data);
    else this.takeBinary(data);
  }

  takeText(text) {
    let message;
    try {
      message = JSON.parse(text);
    } catch {
      this.fail(new StreamError("protocol", "the server sent a text that is no JSON"));
      return;
    }
    if (message.type === "error") this.fail(new StreamError(message.code, message.message));
    else if (message.type === this.waiting?.type) {
      if (message.type === "ready") this.meter = new Meter(message.model.hop_samples);
      this.settle(null, message);
    }
  }

  takeBinary(buffer) {
    const kind = new Uint8Array(buffer, 0, 1)[0];
    if (!this.meter || buffer.byteLength % 2 || (kind !== PCM && kind !== CODES)) {
      this.fail(new StreamError("protocol", "the server sent a message of an unknown kind"));
      return;
    }
    if (this.waiting) this.restart();
    if (kind === CODES) this.handlers.codes(new Uint16Array(buffer, 2));
    else {
      const samples = new Int16Array(buffer, 2);
      this.meter.receivedSamples(samples.length, performance.now());
      this.handlers.audio(samples);
    }
  }

  await_(type, limitMs, late) {
    return new Promise((resolve, reject) => {
      this.waiting = { resolve, reject, type, limitMs, late };
      if (this.over) this.settle(new StreamError("closed", "the connection is closed"));
      else this.restart();
    });
  }

  restart() {
    const { limitMs, late } = this.waiting;
    clearTimeout(this.waiting.timer);
    this.waiting.timer = setTimeout(() => this.fail(new StreamError("no_server", late)), limitMs);
  }

  settle(error, value) {
    const waiting = this.waiting;
    if (!waiting) return false;
    this.waiting = null;
    clearTimeout(waiting.timer);
    if (error) waiting.reject(error);
    else waiting.resolve(value);
    return true;
  }

  // To whoever waits for an answer; where nobody does, to the handler.
  fail(error) {
    if (this.over) return;
    this.over = true;
    this.socket?.close();
    if (!this.settle(error)) this.handlers.failed(error);
  }
}
