// Where audio comes from: the microphone as it is heard, or a recording.

/** Opens the microphone at the hardware's own rate; `onBlock` gets Float32Arrays of a tenth of a second. */
export async function openMicrophone(onBlock, onEnd) {
  if (!navigator.mediaDevices) {
    throw new Error("Browsers give the microphone to https and to localhost alone. Recordings work all the same.");
  }
  const wanted = { channelCount: 1, echoCancellation: false, noiseSuppression: false, autoGainControl: false };
  const stream = await navigator.mediaDevices.getUserMedia({ audio: wanted });
  const context = new AudioContext();
  await context.audioWorklet.addModule("capture.js");
  const source = context.createMediaStreamSource(stream);
  const capture = new AudioWorkletNode(context, "capture", { numberOfOutputs: 0, channelCount: 1, channelCountMode: "explicit" });
  let flushed;
  const last = new Promise((resolve) => { flushed = resolve; });
  capture.port.onmessage = ({ data }) => (data ? onBlock(data) : flushed());
  source.connect(capture);
  stream.getAudioTracks()[0].onended = onEnd; // unplugged
  return {
    sampleRate: context.sampleRate,
    async close() {
      capture.port.postMessage("flush");
      await Promise.race([last, new Promise((resolve) => setTimeout(resolve, 500))]);
      for (const track of stream.getTracks()) track.stop();
      await context.close();
    },
  };
}

/** Decodes a recording at its own rate, where its header tells it, so that its samples stay as they are. */
export async function decode(file) {
  const bytes = await file.arrayBuffer();
  const sampleRate = ownRate(new DataView(bytes)) ?? 48000;
  let buffer;
  try {
    buffer = await new OfflineAudioContext(1, 1, sampleRate).decodeAudioData(bytes);
  } catch {
    throw new Error(`This browser cannot read ${file.name}.`);
  }
  const samples = new Float32Array(buffer.length);
  for (let channel = 0; channel < buffer.numberOfChannels; channel++) {
    const data = buffer.getChannelData(channel);
    for (let i = 0; i < samples.length; i++) samples[i] += data[i] / buffer.numberOfChannels;
  }
  return { samples, sampleRate };
}

/** The sample rate in the header of WAV or FLAC; null for other kinds. */
function ownRate(view) {
  const letters = (at) => String.fromCharCode(...new Uint8Array(view.buffer, at, 4));
  if (view.byteLength < 44) return null;
  if (letters(0) === "fLaC") return (view.getUint32(18) >>> 12) || null;
  if (letters(0) !== "RIFF" || letters(8) !== "WAVE") return null;
  for (let at = 12; at + 16 <= view.byteLength; at += 8 + view.getUint32(at + 4, true)) {
    if (letters(at) === "fmt ") return view.getUint32(at + 12, true);
  }
  return null;
}
