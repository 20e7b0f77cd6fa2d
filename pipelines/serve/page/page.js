// The page: what its buttons do, and what is shown of a session.

import { decode, openMicrophone } from "./audio.js";
import { Session } from "./stream.js";
import { Wave } from "./wave.js";

const MOST_UNANSWERED = 8; // blocks of a recording on their way
const $ = (id) => document.getElementById(id);
const wave = new Wave($("wave"));
let token = new URLSearchParams(location.hash.slice(1)).get("token") ?? undefined;
let running = null; // what stops it: a function

function say(text, kind = "") {
  $("status").textContent = text;
  $("status").dataset.kind = kind;
}

function show(state) {
  running = state;
  $("talk").textContent = state ? "Stop" : "Start listening";
  $("talk").dataset.live = Boolean(state);
  $("file").disabled = Boolean(state);
}

function clock(seconds) {
  return `${Math.floor(seconds / 60)}:${(seconds % 60).toFixed(1).padStart(4, "0")}`;
}

const handlers = {
  partial({ text, time }) {
    $("partial").textContent = text;
    $("heard").textContent = `${time.toFixed(1)} s`;
  },
  final({ text, start, end }) {
    const item = document.createElement("li");
    const time = document.createElement("time");
    const words = document.createElement("span");
    time.textContent = clock(start);
    words.textContent = text;
    item.append(time, words);
    $("finals").append(item);
    $("partial").textContent = "";
    $("count").textContent = $("finals").childElementCount;
    $("copy").disabled = $("clear").disabled = false;
    wave.mark(end);
    item.scrollIntoView({ block: "nearest" });
  },
  lag(milliseconds) {
    $("lag").textContent = `${Math.round(milliseconds)} ms`;
  },
};

function clear() {
  $("finals").replaceChildren();
  $("count").textContent = "0";
  $("copy").disabled = $("clear").disabled = true;
  startAnew();
}

/** What was said before stays: only Clear takes it away. */
function startAnew() {
  $("partial").textContent = "";
  $("heard").textContent = "0.0 s";
  $("lag").textContent = "–";
  wave.clear();
}

function see(samples, sampleRate) {
  let square = 0;
  for (const sample of samples) square += sample * sample;
  $("level").value = 10 * Math.log10(square / samples.length + 1e-6);
  wave.add(samples, sampleRate);
}

function connect(sampleRate, format) {
  const start = { sample_rate: sampleRate, format, token };
  if ($("pause").value) start.endpoint = { trailing_silence: $("pause").valueAsNumber };
  if ($("two-pass").checked) start.two_pass = true;
  return Session.open(start, { ...handlers });
}

async function listen() {
  let session = null;
  const waiting = []; // heard while the server is being connected
  const microphone = await openMicrophone((samples) => {
    see(samples, microphone.sampleRate);
    const block = Int16Array.from(samples, (sample) => Math.max(-32768, Math.min(32767, Math.round(sample * 32768))));
    if (session) session.send(block);
    else waiting.push(block);
  }, () => running?.());
  const stopped = new Promise((resolve) => show(resolve));
  say("Listening. Speak now.");
  try {
    session = await connect(microphone.sampleRate, "s16le");
    for (const block of waiting) session.send(block);
    await Promise.race([stopped, session.done]);
  } finally {
    await microphone.close();
  }
  await session.finish();
}

async function read(file) {
  let stopped = false;
  show(() => { stopped = true; });
  say(`Reading ${file.name}`);
  const { samples, sampleRate } = await decode(file);
  const session = await connect(sampleRate, "f32le");
  const step = Math.round(sampleRate / 4);
  for (let start = 0; start < samples.length && !stopped && !session.over; start += step) {
    const block = samples.slice(start, start + step);
    see(block, sampleRate);
    session.send(block);
    await session.settle(MOST_UNANSWERED);
  }
  await session.finish();
}

/** Runs one session from its first sound to its last word, whatever goes wrong. */
async function run(work) {
  if (running) return;
  startAnew();
  const before = $("finals").childElementCount;
  show(() => {});
  try {
    await work();
    say($("finals").childElementCount > before ? "Done." : "Done. Nothing was said.");
  } catch (error) {
    say(error.name === "NotAllowedError" ? "The microphone was not allowed." : error.message, "error");
    if (error.code === "unauthorized") {
      say("");
      $("login").hidden = false;
      $("token").focus();
    }
  }
  $("partial").textContent = "";
  $("level").value = -60;
  show(null);
}

$("talk").addEventListener("click", () => (running ? running() : run(listen)));
$("file").addEventListener("change", () => {
  const [file] = $("file").files;
  $("file").value = "";
  if (file) run(() => read(file));
});
$("login").addEventListener("submit", (event) => {
  event.preventDefault();
  token = $("token").value;
  $("login").hidden = true;
  $("talk").focus();
  say("Try again now.");
});
$("clear").addEventListener("click", clear);
$("copy").addEventListener("click", async () => {
  const lines = [...$("finals").querySelectorAll("span")].map((words) => words.textContent);
  try {
    await navigator.clipboard.writeText(lines.join("\n"));
    say("Copied.");
  } catch {
    say("The browser did not let the text be copied.", "error");
  }
});

addEventListener("dragover", (event) => {
  event.preventDefault();
  $("drop").hidden = false;
});
addEventListener("dragleave", (event) => {
  if (!event.relatedTarget) $("drop").hidden = true;
});
addEventListener("drop", (event) => {
  event.preventDefault();
  $("drop").hidden = true;
  const [file] = event.dataTransfer.files;
  if (file) run(() => read(file));
});
