// The native websocket protocol, /v1/stream.

/** One live session. Handlers: `partial(message)`, `final(message)`, `lag(ms)`. */
export class Session {
  constructor(socket, handlers) {
    this.socket = socket;
    this.handlers = handlers;
    this.sent = []; // [performance.now() when sent], one for each block without an answer
    this.done = new Promise((resolve, reject) => { this.end = { resolve, reject }; });
    this.done.catch(() => {}); // told where it is awaited
    socket.onmessage = ({ data }) => this.receive(JSON.parse(data));
    socket.onclose = ({ code, reason }) => {
      if (this.finishing && code === 1000) this.end.resolve();
      else this.fail(new Error(reason || `The connection was lost (${code}).`));
    };
  }

  /** Connects and waits until the server takes audio. */
  static async open(start, handlers) {
    const address = new URL("v1/stream", location.href);
    address.protocol = address.protocol.replace("http", "ws");
    address.hash = "";
    const socket = new WebSocket(address);
    await new Promise((resolve, reject) => {
      socket.onopen = resolve;
      socket.onerror = () => reject(new Error("The server cannot be reached."));
    });
    const session = new Session(socket, handlers);
    const ready = new Promise((resolve) => { session.handlers.ready = resolve; });
    socket.send(JSON.stringify({ type: "start", ...start }));
    await Promise.race([ready, session.done]);
    return session;
  }

  /** Whether no more audio is taken; `done` tells why. */
  get over() {
    return this.socket.readyState !== WebSocket.OPEN;
  }

  /** Sends samples, Int16Array or Float32Array as the start message said. */
  send(samples) {
    if (this.over) return;
    this.sent.push(performance.now());
    this.socket.send(samples);
  }

  /** Waits until at most `most` blocks have no answer. */
  async settle(most) {
    while (this.sent.length > most) {
      await Promise.race([new Promise((resolve) => { this.answered = resolve; }), this.done]);
    }
  }

  /** Ends the audio; fulfilled when all text has come. */
  async finish() {
    this.finishing = true;
    if (!this.over) this.socket.send(JSON.stringify({ type: "finish" }));
    await this.done;
  }

  receive(message) {
    if (message.type === "partial") {
      this.handlers.lag(performance.now() - this.sent.shift());
      this.answered?.();
    }
    if (message.type === "error") {
      this.fail(Object.assign(new Error(message.message), { code: message.code }));
    } else {
      this.handlers[message.type]?.(message); // `done` is none: how the server closes tells whether all was heard
    }
  }

  fail(error) {
    this.end.reject(error); // without effect once it is done
    this.socket.close();
  }
}
