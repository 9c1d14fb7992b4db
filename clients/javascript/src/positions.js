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

export class Positions {
  known = null;
  #store; #key; #timer = null; #gone = false;

  constructor(store, key) {
    this.#store = store;
    this.#key = `${key}:seq`;
  }

  async load() {
    const kept = Number(await this.#store.get(this.#key));
    this.known = Number.isSafeInteger(kept) && kept > 0 ? kept : null;
  }

  note(seq) {
    this.known = seq;
    this.#timer ??= setTimeout(() => this.flush(), WRITE_MS);
  }

  flush() {
    clearTimeout(this.#timer);
    this.#timer = null;
    if (this.#gone || this.known === null) return;
    try {
      Promise.resolve(this.#store.set(this.#key, String(this.known))).catch(() => {});
    } catch { /* a full quota: repeats after a reload */ }
  }

  async forget() {
    this.#gone = true;
    clearTimeout(this.#timer);
    this.known = null;
    await this.#store.set(this.#key, null);
  }
}
