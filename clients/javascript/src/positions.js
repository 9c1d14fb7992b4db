// What was handled, kept beyond the page: it drops repeats after a reload, and nothing else. The server's cursor is the
// truth about the device.

/** How often the position is written, at most. */
const WRITE_MS = 200;

export function memoryStore() {
  const kept = new Map();
  return {
    volatile: true,
    get: (key) => kept.get(key) ?? null,
    set: (key, value) => { if (value === null) kept.delete(key); else kept.set(key, value); },
  };
}

/** Calls `then` with a value, or with what it promises: at once where it is there at once. */
export const withValue = (value, then) => (value?.then ? value.then(then) : then(value));

export class Positions {
  /** `{ seq, at }`: what was handled, and when the newest of it was accepted. */
  known = null;
  /** The user is forgotten. */
  gone = false;
  #store; #key; #timer = null; #loaded = false;

  constructor(store, key) {
    this.#store = store;
    this.#key = key;
  }

  async load() {
    const [seq, at] = String(await this.#store.get(this.#key)).split(':').map(Number);
    if (seq && at) this.known = { seq, at };
    // That there is one shows that the user was not forgotten since.
    await this.#store.set(this.#key, this.#text);
    this.#loaded = true;
  }

  get #text() { return this.known ? `${this.known.seq}:${this.known.at}` : '0'; }

  note(seq, at) {
    this.known = { seq, at };
    this.#timer ??= setTimeout(() => this.flush(), WRITE_MS);
  }

  /** Calls `then` with whether another tab has forgotten the user: at once, where the store answers at once. */
  ifForgotten(then) {
    if (!this.#loaded) return undefined;
    return withValue(this.#store.get(this.#key), (kept) => then(this.gone || !kept));
  }

  async flush() {
    clearTimeout(this.#timer);
    this.#timer = null;
    try {
      await this.ifForgotten((forgotten) => forgotten || this.#store.set(this.#key, this.#text));
    } catch { /* a full quota: repeats after a reload */ }
  }
}
