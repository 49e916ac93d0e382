// Microphone samples, cut into pieces of whole frames and made 16-bit, on the audio thread.
class Capture extends AudioWorkletProcessor {
  constructor(options) {
    super();
    this.size = options.processorOptions.pieceSamples;
    this.piece = new Int16Array(this.size);
    this.filled = 0;
    this.on = true;
    this.port.onmessage = () => {
      this.on = false;
      // What was heard of the last piece goes along; `last` says that no more comes.
      const piece = this.piece.slice(0, this.filled);
      this.port.postMessage({ piece, last: true }, [piece.buffer]);
    };
  }

  process([input]) {
    if (!this.on) return false;
    // Without a connected source there is no channel.
    for (const x of input[0] ?? []) {
      // As toInt16 in sources.js.
      this.piece[this.filled++] = Math.max(-32768, Math.min(32767, Math.round(x * (x < 0 ? 32768 : 32767))));
      if (this.filled === this.size) {
        this.port.postMessage({ piece: this.piece, last: false }, [this.piece.buffer]);
        this.piece = new Int16Array(this.size);
        this.filled = 0;
      }
    }
    return true;
  }
}

registerProcessor("capture", Capture);
