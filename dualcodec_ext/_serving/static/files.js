// What the page gives to keep: WAV, and codes as JSON or plain numbers.

/** 16-bit mono WAV of chunks of Int16Array. */
export function wav(chunks, rate) {
  const bytes = chunks.reduce((sum, chunk) => sum + chunk.byteLength, 0);
  const header = new DataView(new ArrayBuffer(44));
  const text = (at, letters) => [...letters].forEach((c, i) => header.setUint8(at + i, c.charCodeAt(0)));
  text(0, "RIFF");
  header.setUint32(4, 36 + bytes, true);
  text(8, "WAVEfmt ");
  header.setUint32(16, 16, true); // bytes of the format that follow
  header.setUint16(20, 1, true); // PCM
  header.setUint16(22, 1, true); // channels
  header.setUint32(24, rate, true);
  header.setUint32(28, 2 * rate, true);
  header.setUint16(32, 2, true); // bytes per sample
  header.setUint16(34, 16, true); // bits per sample
  text(36, "data");
  header.setUint32(40, bytes, true);
  return new Blob([header, ...chunks], { type: "audio/wav" });
}

/** Codes as JSON, a list per codebook, with what made them. */
export function codesJson(codes, model, samplesSent) {
  const { codebooks, frames } = codes;
  const { data } = codes.values;
  const row = (q) => Array.from({ length: frames }, (_, f) => data[f * codebooks + q]);
  const value = {
    format: "dualcodec-ext live codes",
    version: 1,
    model,
    samples_sent: samplesSent,
    codebooks,
    frames,
    codes: Array.from({ length: codebooks }, (_, q) => row(q)),
  };
  return new Blob([JSON.stringify(value)], { type: "application/json" });
}

/** Codes as the wire has them: uint16, little-endian, frame after frame. */
export function codesBinary(codes) {
  const { data, length } = codes.values;
  return new Blob([data.slice(0, length)], { type: "application/octet-stream" });
}

/** Hands a blob to the browser's downloads. */
export function save(blob, name) {
  const link = document.createElement("a");
  link.href = URL.createObjectURL(blob);
  link.download = name;
  link.click();
  setTimeout(() => URL.revokeObjectURL(link.href), 60000);
}
