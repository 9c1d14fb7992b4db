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
  known = null;
  #store; #key; #timer = null; #gone = false;

  constructor(store, key) {
    this.#store = store;
    this.#key = key;
  }

  async load() {
    const kept = Number(await this.#store.get(this.#key));
    this.known = Number.isInteger(kept) && kept > 0 ? kept : null;
    // That there is one shows that the user was not forgotten since.
    await this.#store.set(this.#key, String(this.known ?? 0));
  }

  note(seq) {
    this.known = seq;
    this.#timer ??= setTimeout(() => this.flush(), WRITE_MS);
  }

  /** Calls `then` with whether another tab has forgotten the user: at once, where the store answers at once. */
  ifForgotten(then) {
    return withValue(this.#store.get(this.#key), (kept) => then(this.#gone || (kept ?? null) === null));
  }

  flush() {
    clearTimeout(this.#timer);
    this.#timer = null;
    if (this.known === null) return;
    try {
      this.ifForgotten((forgotten) => forgotten || this.#store.set(this.#key, String(this.known)))?.catch?.(() => {});
    } catch { /* a full quota: repeats after a reload */ }
  }

  async forget() {
    this.#gone = true;
    clearTimeout(this.#timer);
    await this.#store.set(this.#key, null);
  }
}
