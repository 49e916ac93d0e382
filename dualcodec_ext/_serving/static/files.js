// What the page gives to keep: WAV, and codes as JSON or plain numbers. And what codes it takes.

import { StreamError } from "./stream.js";

const FORMAT = "dualcodec-ext live codes";

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
    format: FORMAT,
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

const LONGEST_HEADER_BYTES = 1e8; // of safetensors; more is something else's first bytes

class Damaged extends Error {}

// The rows [codebooks][frames] of a safetensors code file, the semantic one first, and the model's name.
function fromSafetensors(buffer) {
  const size = Number(new DataView(buffer).getBigUint64(0, true));
  if (size > LONGEST_HEADER_BYTES) throw new Error("no header");
  const data = 8 + size;
  if (data > buffer.byteLength) throw new Damaged();
  const header = JSON.parse(new TextDecoder().decode(new Uint8Array(buffer, 8, size)));
  const { model } = JSON.parse(header.__metadata__.dualcodec_ext);
  const rows = [];
  for (const name of ["semantic", "acoustic"]) {
    if (!header[name]) continue;
    const { dtype, shape, data_offsets: [from, to] } = header[name];
    if (dtype !== "U16") throw new Error("codes are U16");
    // Slices that reach past the end would give fewer codes, or none.
    if (to - from !== 2 * shape[0] * shape[1] || data + to > buffer.byteLength) throw new Damaged();
    for (let q = 0; q < shape[0]; q++) {
      // A copy, since a view would have to begin at an even place.
      const at = data + from + 2 * q * shape[1];
      rows.push(new Uint16Array(buffer.slice(at, at + 2 * shape[1])));
    }
  }
  return { model, rows };
}

/** Reads a code file or this page's JSON: codes [frames * codebooks], at most so many codebooks, and how many. */
export async function readCodes(file, model, most) {
  const buffer = await file.arrayBuffer();
  let found;
  try {
    if (file.name.endsWith(".json")) {
      const value = JSON.parse(new TextDecoder().decode(buffer));
      if (value.format !== FORMAT) throw new Error("another format");
      found = { model: value.model.name, rows: value.codes };
    } else found = fromSafetensors(buffer);
  } catch (error) {
    const why = error instanceof Damaged ? "cut short or damaged" : "no code file, nor JSON of this page";
    throw new StreamError("codes", `${file.name} is ${why}`);
  }
  const { rows } = found;
  if (found.model !== model.name) {
    throw new StreamError("codes", `${file.name} is of the model ${found.model}, the server runs ${model.name}`);
  }
  const codebooks = Math.min(rows.length, most);
  const frames = rows[0]?.length ?? 0;
  const codes = new Uint16Array(frames * codebooks);
  for (let q = 0; q < codebooks; q++) {
    for (let f = 0; f < frames; f++) {
      const code = rows[q][f];
      if (!(code >= 0 && code < model.codebook_sizes[q])) {
        throw new StreamError("codes", `${file.name} has a code out of range at codebook ${q + 1}, frame ${f + 1}`);
      }
      codes[f * codebooks + q] = code;
    }
  }
  return { codes, codebooks };
}

/** Hands a blob to the browser's downloads. */
export function save(blob, name) {
  const link = document.createElement("a");
  link.href = URL.createObjectURL(blob);
  link.download = name;
  link.click();
  setTimeout(() => URL.revokeObjectURL(link.href), 60000);
}
