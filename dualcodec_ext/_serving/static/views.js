// The pictures, all on one time axis. Each is drawn whole from the history, so that any stretch can be shown.

const PIXELS_PER_S = 120;
const SPAN_S = [3, 10];
const MOST_CODES = 65536;
const TICKS_MS = [10, 20, 50, 100, 200, 500, 1000, 2000, 5000, 10000, 20000, 50000];

// Spectrograms go from the ground through a hue of their side to the ink.
const THEMES = {
  dark: {
    ground: "#0d141b",
    line: "#26323d",
    text: "#9fb0bf",
    head: "#ffffff",
    in: "#38bdb5",
    out: "#f0a03c",
    latency: "#b48ef0",
    inRamp: ["#0d141b", "#0c3a4a", "#14807f", "#5fd8c4", "#f2fffb"],
    outRamp: ["#0d141b", "#43232a", "#a44a24", "#f0a03c", "#fff8e2"],
    code: [0.62, 0.42, 0.3], // saturation, least lightness, its range
  },
  light: {
    ground: "#ffffff",
    line: "#d9e0e6",
    text: "#4d5c69",
    head: "#000000",
    in: "#0b7a75",
    out: "#b25a00",
    latency: "#6d3fc0",
    inRamp: ["#ffffff", "#bfe6df", "#4fb0a6", "#0a5f66", "#03202a"],
    outRamp: ["#ffffff", "#fbdfb8", "#e59a45", "#8f3d12", "#2b0f08"],
    code: [0.6, 0.42, 0.3],
  },
};

const rgb = (hex) => [1, 3, 5].map((i) => parseInt(hex.slice(i, i + 2), 16));
const pack = ([r, g, b]) => ((255 << 24) | (b << 16) | (g << 8) | r) >>> 0; // ImageData's bytes, little-endian

function ramp(stops) {
  const colors = stops.map(rgb);
  return Uint32Array.from({ length: 256 }, (_, level) => {
    const at = (level / 255) * (colors.length - 1);
    const i = Math.min(Math.floor(at), colors.length - 2);
    return pack(colors[i].map((c, k) => Math.round(c + (at - i) * (colors[i + 1][k] - c))));
  });
}

function hsl(hue, saturation, lightness) {
  const channel = (n) => {
    const k = (n + 12 * hue) % 12;
    const a = saturation * Math.min(lightness, 1 - lightness);
    return Math.round(255 * (lightness - a * Math.max(-1, Math.min(k - 3, 9 - k, 1))));
  };
  return [channel(0), channel(8), channel(4)];
}

// Neighbouring codes have nothing in common, so their colours lie far apart: steps by irrational fractions.
function codeColors([saturation, least, range]) {
  return Uint32Array.from({ length: MOST_CODES }, (_, code) =>
    pack(hsl((code * 0.618034) % 1, saturation, least + range * ((code * 0.754878) % 1))),
  );
}

/** A canvas in device pixels, cleared to the ground. */
class Surface {
  constructor(id) {
    this.canvas = document.getElementById(id);
    this.context = this.canvas.getContext("2d", { alpha: false });
    this.scratch = document.createElement("canvas");
  }

  clear(ground) {
    const { canvas, context } = this;
    this.scale = window.devicePixelRatio || 1;
    this.width = canvas.clientWidth;
    this.height = canvas.clientHeight;
    const [w, h] = [this.width, this.height].map((n) => Math.max(1, Math.round(n * this.scale)));
    if (canvas.width !== w || canvas.height !== h) [canvas.width, canvas.height] = [w, h];
    context.setTransform(this.scale, 0, 0, this.scale, 0, 0);
    context.fillStyle = ground;
    context.fillRect(0, 0, this.width, this.height);
    return context;
  }

  /** Draws an image of packed pixels [height, width] at a place, in CSS pixels. */
  image(pixels, width, height, x, y, w, h, smooth) {
    const { scratch, context } = this;
    [scratch.width, scratch.height] = [width, height];
    const data = new ImageData(new Uint8ClampedArray(pixels.buffer), width, height);
    scratch.getContext("2d").putImageData(data, 0, 0);
    context.imageSmoothingEnabled = smooth;
    context.drawImage(scratch, x, y, w, h);
  }
}

export class Views {
  constructor() {
    const ids = ["wave-in", "spectrogram-in", "codes", "spectrogram-out", "wave-out", "latencies", "axis"];
    this.surfaces = Object.fromEntries(ids.map((id) => [id, new Surface(id)]));
    this.light = window.matchMedia("(prefers-color-scheme: light)");
    this.light.addEventListener("change", () => this.adopt());
    this.adopt();
  }

  adopt() {
    const theme = (this.theme = THEMES[this.light.matches ? "light" : "dark"]);
    this.ramps = { in: ramp(theme.inRamp), out: ramp(theme.outRamp) };
    this.codeColors = codeColors(theme.code);
  }

  /** Seconds that fit. */
  get span() {
    const wanted = this.surfaces.axis.canvas.clientWidth / PIXELS_PER_S;
    return Math.max(SPAN_S[0], Math.min(SPAN_S[1], wanted));
  }

  /**
   * Draws the seconds from `from` on.
   *
   * `clip`: { in, out: Track, codes: Codes, meter: Meter, playedSeconds, frameSeconds }, or null for empty pictures.
   */
  draw(clip, from) {
    this.from = from;
    this.to = from + this.span;
    for (const side of ["in", "out"]) {
      this.wave(this.surfaces[`wave-${side}`], clip?.[side], this.theme[side]);
      this.spectrogram(this.surfaces[`spectrogram-${side}`], clip?.[side], this.ramps[side]);
    }
    this.codes(this.surfaces.codes, clip?.codes);
    this.latencies(this.surfaces.latencies, clip);
    this.axis(this.surfaces.axis);
    if (clip?.playedSeconds > 0) {
      for (const id of ["spectrogram-out", "wave-out"]) this.playhead(this.surfaces[id], clip.playedSeconds);
    }
  }

  // Seconds to CSS pixels.
  x(surface, seconds) {
    return ((seconds - this.from) / (this.to - this.from)) * surface.width;
  }

  wave(surface, track, color) {
    const context = surface.clear(this.theme.ground);
    const middle = surface.height / 2;
    context.fillStyle = this.theme.line;
    context.fillRect(0, middle - 0.5, surface.width, 1);
    if (!track) return;
    context.fillStyle = color;
    const rate = track.columnsPerSecond;
    const last = Math.min(track.low.length, Math.ceil(this.to * rate));
    const width = surface.width / (rate * (this.to - this.from));
    for (let column = Math.max(0, Math.floor(this.from * rate)); column < last; column++) {
      const top = middle * (1 - track.high.data[column] / 32768);
      const bottom = middle * (1 - track.low.data[column] / 32768);
      context.fillRect(this.x(surface, column / rate), top - 0.5, Math.max(width, 0.75), bottom - top + 1);
    }
  }

  spectrogram(surface, track, colors) {
    surface.clear(this.theme.ground);
    if (!track) return;
    const rate = track.columnsPerSecond;
    const { bands } = track;
    const { data, length } = track.levels;
    const first = Math.max(0, Math.floor(this.from * rate));
    const columns = Math.min(length / bands, Math.ceil(this.to * rate)) - first;
    if (columns > 0) {
      const pixels = new Uint32Array(columns * bands);
      for (let column = 0; column < columns; column++) {
        const at = (first + column) * bands;
        for (let band = 0; band < bands; band++) {
          pixels[(bands - 1 - band) * columns + column] = colors[data[at + band]];
        }
      }
      const x = this.x(surface, first / rate);
      const width = this.x(surface, (first + columns) / rate) - x;
      surface.image(pixels, columns, bands, x, 0, width, surface.height, true);
    }
    for (const hz of [500, 1000, 2000, 4000, 8000]) {
      const y = surface.height * (1 - track.height(hz));
      if (y > 10) this.label(surface, hz < 1000 ? `${hz} Hz` : `${hz / 1000} kHz`, y + 3);
    }
  }

  codes(surface, codes) {
    const context = surface.clear(this.theme.ground);
    if (!codes) return;
    const { codebooks, frameRate, frames } = codes;
    const first = Math.max(0, Math.floor(this.from * frameRate));
    const count = Math.min(frames, Math.ceil(this.to * frameRate)) - first;
    if (count <= 0) return;
    const { data } = codes.values;
    const pixels = new Uint32Array(count * codebooks);
    for (let f = 0; f < count; f++) {
      for (let q = 0; q < codebooks; q++) pixels[q * count + f] = this.codeColors[data[(first + f) * codebooks + q]];
    }
    const x = this.x(surface, first / frameRate);
    const width = this.x(surface, (first + count) / frameRate) - x;
    surface.image(pixels, count, codebooks, x, 0, width, surface.height, false);
    context.fillStyle = this.theme.ground;
    for (let q = 1; q < codebooks; q++) {
      const thickness = q === 1 ? 3 : 1; // the semantic row stands apart
      context.fillRect(0, (surface.height * q) / codebooks - thickness / 2, surface.width, thickness);
    }
  }

  latencies(surface, clip) {
    const context = surface.clear(this.theme.ground);
    if (!clip?.meter?.latencies.length) return;
    const { latencies } = clip.meter;
    const first = Math.max(0, Math.floor(this.from / clip.frameSeconds) - 1);
    const last = Math.min(latencies.length, Math.ceil(this.to / clip.frameSeconds));
    let most = 0;
    for (let f = first; f < last; f++) most = Math.max(most, latencies[f]);
    const top = TICKS_MS.find((tick) => tick >= most) ?? most;
    const y = (ms) => surface.height * (1 - (0.9 * ms) / top);
    context.fillStyle = this.theme.latency;
    const width = this.x(surface, this.from + clip.frameSeconds);
    for (let f = first; f < last; f++) {
      const left = this.x(surface, f * clip.frameSeconds);
      context.fillRect(left, y(latencies[f]), Math.max(width - 0.5, 0.75), surface.height);
    }
    context.fillStyle = this.theme.line;
    context.fillRect(0, y(top), surface.width, 1);
    this.label(surface, `${top} ms`, y(top) + 11);
  }

  axis(surface) {
    const context = surface.clear(this.theme.ground);
    context.font = "11px system-ui, sans-serif";
    context.textAlign = "center";
    for (let second = Math.ceil(this.from); second <= this.to; second++) {
      const x = this.x(surface, second);
      context.fillStyle = this.theme.line;
      context.fillRect(x, 0, 1, 5);
      context.fillStyle = this.theme.text;
      const text = `${Math.floor(second / 60)}:${String(second % 60).padStart(2, "0")}`;
      if (x > 12 && x < surface.width - 12) context.fillText(text, x, 16);
    }
  }

  // At the right edge, legible on any picture.
  label({ context, width }, text, y) {
    context.font = "600 10px system-ui, sans-serif";
    context.textAlign = "right";
    context.lineJoin = "round";
    context.lineWidth = 3;
    context.strokeStyle = this.theme.ground;
    context.fillStyle = this.theme.text;
    context.strokeText(text, width - 4, y);
    context.fillText(text, width - 4, y);
  }

  playhead(surface, seconds) {
    const x = this.x(surface, seconds);
    if (x < 0 || x > surface.width) return;
    surface.context.fillStyle = this.theme.head;
    surface.context.fillRect(x - 0.75, 0, 1.5, surface.height);
  }
}
