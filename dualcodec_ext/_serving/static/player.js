// The result, played while it arrives.

import { loadWorklet } from "./stream.js";

const LATE_S = 0.5; // a live queue longer than the pre-roll by this much is cut

export class Player {
  constructor(context) {
    this.context = context;
    this.status = { queued: 0, played: 0, skipped: 0, underruns: 0, over: false };
  }

  /** `live`: late audio is skipped, so that a stall does not delay all that follows. */
  async start(prerollMs, muted, live) {
    const { context } = this;
    const prerollSamples = Math.round((prerollMs / 1000) * context.sampleRate);
    await loadWorklet(context, "playback-worklet.js");
    this.node = new AudioWorkletNode(context, "playback", {
      numberOfInputs: 0,
      outputChannelCount: [1],
      processorOptions: { prerollSamples, mostSamples: live ? prerollSamples + LATE_S * context.sampleRate : 0 },
    });
    this.node.port.onmessage = ({ data }) => {
      this.status = data;
      if (data.over) this.close();
    };
    this.gain = new GainNode(context, { gain: muted ? 0 : 1 });
    this.node.connect(this.gain).connect(context.destination);
  }

  play(samples) {
    const x = Float32Array.from(samples, (s) => s / 32768);
    this.node?.port.postMessage(x, [x.buffer]);
  }

  mute(muted) {
    this.gain?.gain.setTargetAtTime(muted ? 0 : 1, this.context.currentTime, 0.01);
  }

  /** No more comes: what is queued is played, then the audio device is let go. */
  end() {
    this.node?.port.postMessage("end");
  }

  close() {
    if (this.node) this.node.port.onmessage = null; // a report may still be on its way
    this.status = { ...this.status, queued: 0, over: true };
    if (this.context.state !== "closed") this.context.close();
  }
}
