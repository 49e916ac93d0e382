// What a stream has been so far, in the form that the pictures and the downloads need.

const COLUMNS_PER_S = 100;
const BANDS = 96;
const FLOOR_DB = -85;
const CEILING_DB = -15;
const WINDOW_S = 0.03;
const KEPT_S = 1200; // audio kept for listening and downloads

/** A typed array that grows at its end. */
class Growing {
  constructor(Type) {
    this.data = new Type(4096);
    this.length = 0;
  }

  room(count) {
    if (this.length + count > this.data.length) {
      const larger = new this.data.constructor(Math.max(2 * this.data.length, this.length + count));
      larger.set(this.data.subarray(0, this.length));
      this.data = larger;
    }
    this.length += count;
    return this.length - count;
  }

  append(values) {
    const at = this.room(values.length);
    this.data.set(values, at);
  }
}

const hzToMel = (hz) => 2595 * Math.log10(1 + hz / 700);
const melToHz = (mel) => 700 * (10 ** (mel / 2595) - 1);

/** Power spectra of real windows of N samples, N a power of two. */
class Fft {
  constructor(size) {
    this.size = size;
    this.re = new Float64Array(size);
    this.im = new Float64Array(size);
    this.cos = Float64Array.from({ length: size / 2 }, (_, k) => Math.cos((2 * Math.PI * k) / size));
    this.sin = Float64Array.from({ length: size / 2 }, (_, k) => -Math.sin((2 * Math.PI * k) / size));
    const bits = Math.log2(size);
    this.order = Uint32Array.from({ length: size }, (_, i) => {
      let reversed = 0;
      for (let b = 0; b < bits; b++) reversed |= ((i >> b) & 1) << (bits - 1 - b);
      return reversed;
    });
  }

  /** Fills power [size / 2 + 1] from x [size], which has been windowed. */
  power(x, power) {
    const { size, re, im, cos, sin, order } = this;
    for (let i = 0; i < size; i++) {
      re[i] = x[order[i]];
      im[i] = 0;
    }
    for (let half = 1; half < size; half *= 2) {
      const stride = size / (2 * half);
      for (let start = 0; start < size; start += 2 * half) {
        for (let k = 0; k < half; k++) {
          const a = start + k;
          const b = a + half;
          const c = cos[k * stride];
          const s = sin[k * stride];
          const tr = re[b] * c - im[b] * s;
          const ti = re[b] * s + im[b] * c;
          re[b] = re[a] - tr;
          im[b] = im[a] - ti;
          re[a] += tr;
          im[a] += ti;
        }
      }
    }
    for (let k = 0; k <= size / 2; k++) power[k] = re[k] * re[k] + im[k] * im[k];
  }
}

/** One side of the stream: peaks and spectra per column of 10 ms, and the samples themselves. */
export class Track {
  constructor(rate) {
    this.rate = rate;
    this.samples = 0;
    this.chunks = [];
    this.kept = 0;
    this.low = new Growing(Int16Array); // [columns]
    this.high = new Growing(Int16Array);
    this.levels = new Growing(Uint8Array); // [columns, BANDS], 0 at FLOOR_DB, 255 at CEILING_DB
    this.step = Math.round(rate / COLUMNS_PER_S);
    const size = 2 ** Math.round(Math.log2(rate * WINDOW_S));
    this.fft = new Fft(size);
    this.window = Float64Array.from({ length: size }, (_, i) => 0.5 - 0.5 * Math.cos((2 * Math.PI * i) / size));
    this.windowed = new Float64Array(size);
    this.power = new Float64Array(size / 2 + 1);
    this.ring = new Float64Array(size); // the last `size` samples, zeros before the first one
    // A column's window has its middle in the column's middle.
    this.next = this.step / 2 + size / 2;
    const top = hzToMel(rate / 2);
    this.edges = Float64Array.from({ length: BANDS + 1 }, (_, i) => (melToHz((top * i) / BANDS) * size) / rate);
  }

  get seconds() {
    return this.samples / this.rate;
  }

  get bands() {
    return BANDS;
  }

  get columnsPerSecond() {
    return this.rate / this.step;
  }

  /** Where a frequency lies in a spectrogram: 0 at the bottom, 1 at the top. */
  height(hz) {
    return hzToMel(hz) / hzToMel(this.rate / 2);
  }

  add(samples) {
    if (this.kept < KEPT_S * this.rate) {
      this.chunks.push(samples);
      this.kept += samples.length;
    }
    const { ring, step } = this;
    for (let i = 0; i < samples.length; i++) {
      const column = Math.floor(this.samples / step);
      if (column === this.low.length) {
        this.low.append([samples[i]]);
        this.high.append([samples[i]]);
      } else if (samples[i] < this.low.data[column]) this.low.data[column] = samples[i];
      else if (samples[i] > this.high.data[column]) this.high.data[column] = samples[i];
      ring[this.samples % ring.length] = samples[i] / 32768;
      this.samples += 1;
      if (this.samples >= this.next) this.addColumn();
    }
  }

  addColumn() {
    const { ring, window, windowed, power, edges } = this;
    const size = ring.length;
    for (let i = 0; i < size; i++) windowed[i] = ring[(this.samples + i) % size] * window[i];
    this.fft.power(windowed, power);
    const at = this.levels.room(BANDS);
    const full = (size / 4) ** 2; // of a sine of amplitude 1
    for (let band = 0; band < BANDS; band++) {
      const db = 10 * Math.log10(this.strongest(edges[band], edges[band + 1]) / full + 1e-12);
      const level = (255 * (db - FLOOR_DB)) / (CEILING_DB - FLOOR_DB);
      this.levels.data[at + band] = Math.max(0, Math.min(255, level));
    }
    this.next += this.step;
  }

  // The strongest bin between two places; where they hold none, what lies between the neighbours.
  strongest(from, to) {
    const { power } = this;
    const middle = (from + to) / 2;
    const left = Math.min(Math.floor(middle), power.length - 2);
    let best = power[left] + (middle - left) * (power[left + 1] - power[left]);
    for (let k = Math.ceil(from); k < to; k++) best = Math.max(best, power[k]);
    return best;
  }
}

/** The codes, frame after frame. */
export class Codes {
  constructor(codebooks, frameRate) {
    this.codebooks = codebooks;
    this.frameRate = frameRate;
    this.values = new Growing(Uint16Array); // [frames, codebooks]
  }

  get frames() {
    return this.values.length / this.codebooks;
  }

  add(codes) {
    this.values.append(codes);
  }
}
