// A queue of samples that plays once enough lie in it; running empty before the end counts as an underrun.
const REPORT_EVERY_BLOCKS = 16;

class Playback extends AudioWorkletProcessor {
  constructor(options) {
    super();
    const { prerollSamples, mostSamples } = options.processorOptions;
    this.preroll = prerollSamples;
    this.most = mostSamples; // a live queue over this is cut to the pre-roll, or its delay would stay; 0: never
    this.pieces = [];
    this.at = 0; // samples of the first piece that have been played
    this.queued = 0;
    this.played = 0;
    this.skipped = 0;
    this.underruns = 0;
    this.running = false;
    this.ended = false;
    this.over = false;
    this.blocks = 0;
    this.port.onmessage = ({ data }) => {
      if (data === "end") this.ended = true;
      else {
        this.pieces.push(data);
        this.queued += data.length;
      }
    };
  }

  // Takes samples off the queue, into target unless it is null.
  take(count, target) {
    for (let done = 0; done < count; ) {
      const piece = this.pieces[0];
      const n = Math.min(count - done, piece.length - this.at);
      if (target) target.set(piece.subarray(this.at, this.at + n), done);
      done += n;
      this.at += n;
      if (this.at === piece.length) {
        this.pieces.shift();
        this.at = 0;
      }
    }
    this.queued -= count;
  }

  process(inputs, [output]) {
    const target = output[0];
    if (!this.running && this.queued && (this.queued >= this.preroll || this.ended)) this.running = true;
    if (this.running) {
      if (this.most && this.queued > this.most) {
        const extra = this.queued - this.preroll;
        this.take(extra, null);
        this.skipped += extra;
      }
      const n = Math.min(target.length, this.queued);
      this.take(n, target);
      this.played += n;
      if (n < target.length) {
        this.running = false;
        if (!this.ended) this.underruns += 1;
      }
    }
    const over = this.ended && !this.queued;
    if (over !== this.over || ++this.blocks % REPORT_EVERY_BLOCKS === 0) {
      this.over = over;
      const { queued, played, skipped, underruns } = this;
      this.port.postMessage({ queued, played, skipped, underruns, over });
    }
    return !over;
  }
}

registerProcessor("playback", Playback);
