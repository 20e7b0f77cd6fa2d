// The waveform of the last ten seconds, with a line where each segment ended.

const SECONDS = 10;
const BARS_PER_SECOND = 50;

export class Wave {
  constructor(canvas) {
    this.canvas = canvas;
    this.clear();
    new ResizeObserver(() => this.redraw()).observe(canvas);
    matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => this.redraw());
  }

  clear() {
    this.bars = []; // peaks, newest last
    this.endpoints = []; // seconds
    this.seconds = 0;
    this.peak = 0;
    this.held = 0; // samples in the unfinished bar
    this.redraw();
  }

  /** Takes samples as they are heard. */
  add(samples, sampleRate) {
    const width = Math.round(sampleRate / BARS_PER_SECOND);
    for (const sample of samples) {
      this.peak = Math.max(this.peak, Math.abs(sample));
      if (++this.held >= width) {
        this.bars.push(this.peak);
        this.peak = this.held = 0;
      }
    }
    this.bars.splice(0, this.bars.length - SECONDS * BARS_PER_SECOND);
    this.seconds += samples.length / sampleRate;
    this.redraw();
  }

  /** Marks the end of a segment. */
  mark(seconds) {
    this.endpoints = [...this.endpoints.filter((at) => at > this.seconds - SECONDS), seconds];
    this.redraw();
  }

  redraw() {
    this.frame ??= requestAnimationFrame(() => {
      this.frame = null;
      this.draw();
    });
  }

  draw() {
    const { canvas } = this;
    const scale = devicePixelRatio || 1;
    const width = (canvas.width = Math.round(canvas.clientWidth * scale));
    const height = (canvas.height = Math.round(canvas.clientHeight * scale));
    const style = getComputedStyle(canvas);
    const colour = (name) => style.getPropertyValue(name).trim();
    const context = canvas.getContext("2d");
    const step = width / (SECONDS * BARS_PER_SECOND);
    context.fillStyle = colour("--line");
    context.fillRect(0, height / 2, width, scale);
    context.fillStyle = colour("--accent");
    const left = width - this.bars.length * step;
    const half = (peak) => Math.max(scale, Math.sqrt(peak) * height * 0.46); // quiet speech is seen too
    context.beginPath();
    context.moveTo(left, height / 2);
    this.bars.forEach((peak, i) => context.lineTo(left + i * step, height / 2 - half(peak)));
    this.bars.forEach((_, i, bars) => context.lineTo(width - (i + 1) * step, height / 2 + half(bars.at(-1 - i))));
    context.fill();
    context.fillStyle = colour("--alarm");
    for (const at of this.endpoints) {
      const x = width - (this.seconds - at) * BARS_PER_SECOND * step;
      context.fillRect(x, 0, 2 * scale, height);
    }
  }
}
