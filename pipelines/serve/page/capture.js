// Runs beside the sound card: joins its tiny blocks to a tenth of a second each.

class Capture extends AudioWorkletProcessor {
  constructor() {
    super();
    this.block = new Float32Array(Math.round(sampleRate / 10));
    this.filled = 0;
    this.port.onmessage = () => this.flush();
  }

  flush() {
    this.post(this.block.slice(0, this.filled));
    this.post(null); // the last of it
    this.filled = 0;
  }

  post(samples) {
    this.port.postMessage(samples, samples ? [samples.buffer] : []);
  }

  process([channels]) {
    const samples = channels[0] ?? new Float32Array(0);
    let taken = 0;
    while (taken < samples.length) {
      const part = samples.subarray(taken, taken + this.block.length - this.filled);
      this.block.set(part, this.filled);
      this.filled += part.length;
      taken += part.length;
      if (this.filled === this.block.length) {
        this.post(this.block.slice());
        this.filled = 0;
      }
    }
    return true;
  }
}

registerProcessor("capture", Capture);
