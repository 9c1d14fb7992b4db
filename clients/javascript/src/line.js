// One socket, from its opening to its end. It parses frames, and notices silence.

import { RingpushError } from './errors.js';
import { logOf } from './pump.js';

/** Time between two frames about watched topics. */
const PACE_MS = 120;

export const isVisible = () => globalThis.document?.visibilityState !== 'hidden';

export const pause = (ms) => new Promise((resolve) => { setTimeout(resolve, ms); });

/** Where to open a socket, by `POST /v1/connect`; null where the server has no such call or it cannot be read. */
export async function placeOf(base, token, device, signal) {
  try {
    const answer = await fetch(new URL('v1/connect', base), {
      method: 'POST',
      headers: { authorization: `Bearer ${token}`, 'content-type': 'application/json' },
      body: JSON.stringify({ device }),
      signal,
    });
    if (answer.status === 404 || answer.status === 405) return null;
    if (!answer.ok) throw await RingpushError.of(answer);
    const place = await answer.json();
    return place?.url || place?.socket ? place : null;
  } catch (error) {
    if (error.status) throw error;
    return null; // no answer, or one that cannot be read, as another origin's: the socket itself will tell
  }
}

export class Line {
  welcome = null;
  caughtUp = false;
  /** By log: the last number that came here, the last ack that was said here, and where the last reset went on. */
  seq = {};
  acked = {};
  reset = {};
  /** By topic: `left`s that are due for what this side has ended. */
  lefts = {};
  heard = 0;
  #socket; #watching = null; #asking = null; #heardAt = 0; #end; #open = false; #handler = null; #kept = []; #turn = 0;

  constructor(WebSocket, url, credential, ask, patience) {
    this.ended = new Promise((resolve) => { this.#end = resolve; });
    const target = new URL(url);
    if (!credential) {
      for (const [name, value] of Object.entries(ask)) {
        if (name !== 'device') target.searchParams.set(name, value === true ? '1' : value);
      }
    }
    const socket = this.#socket = new WebSocket(target.href, 'ringpush.v1.json');
    this.opened = new Promise((resolve, reject) => {
      const late = setTimeout(() => this.fail('silent'), patience);
      const settle = (how, value) => { clearTimeout(late); how(value); };
      socket.onopen = () => {
        if (credential) this.send({ type: 'auth', ...credential, ...ask });
      };
      socket.onmessage = ({ data }) => {
        this.heard += 1;
        this.#heardAt = performance.now();
        let frame;
        try { frame = JSON.parse(data); } catch { return this.fail('rubbish'); }
        if (typeof frame?.type !== 'string') return this.fail('rubbish');
        if (frame.type === 'message') this.seq[logOf(frame)] = frame.seq;
        if (frame.type === 'welcome' && !this.#open) {
          this.#open = true;
          settle(resolve);
        }
        if (this.#open) this.#give(frame);
        else if (frame.type === 'error') this.refusal = frame;
      };
      socket.onclose = ({ code, reason }) => {
        const why = this.refusal?.reason || reason;
        const error = new RingpushError('closed', why || `closed with ${code}`);
        Object.assign(error, { code, reason: why, hint: this.refusal?.reconnect });
        settle(reject, error);
        this.#over(code, why);
      };
      socket.onerror = () => {}; // a close follows
    });
    this.opened.catch(() => {});
  }

  /** From now on `handler` has the frames, those first that came before. */
  begin(handler) {
    this.#handler = handler;
    for (const frame of this.#kept.splice(0)) handler(frame);
  }

  #give(frame) {
    if (this.#handler) this.#handler(frame);
    else this.#kept.push(frame);
  }

  send(frame) {
    if (this.#socket.readyState === 1) this.#socket.send(JSON.stringify(frame));
  }

  /** Says a frame about a watched topic, when its turn comes: the server takes ten in a second. */
  sayPaced(frame) {
    const now = Date.now();
    this.#turn = Math.max(this.#turn + PACE_MS, now);
    setTimeout(() => this.send(frame), this.#turn - now);
  }

  /** From now on a silence of `every` and `grace` ends the line. A server that sends no heartbeat is asked. */
  watch(every, grace, ask) {
    if (!(every > 0)) return;
    if (ask) this.#asking = setInterval(() => this.send({ type: 'ping' }), every);
    // One timer for all frames: what is heard meanwhile only puts it off.
    const look = () => {
      const left = this.#heardAt + every + grace - performance.now();
      if (left > 0) this.#watching = setTimeout(look, left);
      else this.fail('silent');
    };
    look();
  }

  /** The line is lost: nothing that still comes counts. */
  fail(reason) {
    const socket = this.#socket;
    this.#over(1006, reason);
    socket.onclose?.({ code: 1006, reason });
    socket.onclose = null;
    try { socket.close(); } catch { /* it was never open */ }
  }

  close() {
    try { this.#socket.close(1000); } catch { /* it was never open */ }
    setTimeout(() => this.#over(1000, 'closed'), 1_000);
  }

  #over(code, reason) {
    clearTimeout(this.#watching);
    clearInterval(this.#asking);
    this.#end({ code, reason });
  }
}
