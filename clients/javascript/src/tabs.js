// `tabs: 'shared'`: one socket for all tabs of a user. Web Locks elect the tab that holds it (the leader); it hands what
// comes to the others over a BroadcastChannel, and acks what it and every visible tab have handled.
//
// What is said on the channel: the leader says `lead` (its term and positions), `message`, `gap`, `state` and `beat`, each
// with its `term` and `era` (how many resets there were); a tab says `hello` and what it has handled, `bye`, `wake`,
// `refresh` and `forget`. Whatever else comes there is of another version, and ignored.

import { pause } from './line.js';
import { withValue } from './positions.js';

/** How often the tabs that are waited for are looked at. */
const PRUNE_MS = 2_000;
const BEAT_MS = 5_000;
/** A leader that says nothing for its heartbeat and this has gone without a word. */
const GRACE_MS = 5_000;
/** How long a tab may take to say what it has handled before it is not waited for. */
const REPORT_MS = 1_000;

export const isSupported = () => Boolean(globalThis.navigator?.locks && globalThis.BroadcastChannel);

export class Tabs {
  leads = false;
  #name; #hooks; #pump; #store; #id = crypto.randomUUID();
  #channel = null; #chain = Promise.resolve(); #leading = Promise.resolve();
  #term = 0; #era = 0; #tabs = new Map();
  #release = null; #releaseTab = null; #asking = null; #over = false;
  #sign = 0; #silence = 25_000 + GRACE_MS; #beaten = 0; #pruned = 0;

  constructor(name, store, pump, hooks) {
    this.#name = name;
    this.#store = store;
    this.#pump = pump;
    this.#hooks = hooks;
  }

  join() {
    if (this.#channel || this.#over) return;
    const channel = this.#channel = new BroadcastChannel(this.#name);
    channel.onmessage = ({ data }) => this.#heard(data);
    this.#asking = new AbortController();
    // Shows the others that this tab lives.
    navigator.locks.request(`${this.#name}:${this.#id}`, { signal: this.#asking.signal },
      () => new Promise((resolve) => { this.#releaseTab = resolve; })).catch(() => {});
    this.#sign = Date.now();
    this.#report(true);
    this.#ask();
  }

  /** Gives up lock, socket and channel: the page is hidden for good, or frozen. */
  leave() {
    if (!this.#channel) return;
    this.#say({ tab: this.#id, bye: true });
    this.#channel.close();
    this.#channel = null;
    this.#asking.abort();
    this.#releaseTab?.();
    this.#depose();
  }

  stop() {
    this.#over = true;
    this.leave();
  }

  // --- what the client tells ----------------------------------------------------------------------

  /** The leader's line has begun, or its positions have changed. */
  announce() { if (this.leads) this.#say({ lead: this.#lead() }); }

  /** Hands on what the leader's line has brought. */
  relay(what) {
    if (!this.leads) return;
    if (what.gap?.reason === 'reset') {
      this.#era += 1;
      this.#keep('era', this.#era);
      for (const tab of this.#tabs.values()) tab.handled = null;
    }
    this.#say({ ...what, term: this.#term, era: this.#era });
  }

  beat() {
    this.#beaten = Date.now();
    // With it a tab sees what it has missed.
    this.relay({ beat: true, after: this.#pump.received });
  }

  ask(what) { this.#say({ [what]: true }); }

  /** This tab has handled more, or its visibility has changed. */
  handled() {
    if (this.leads) this.#ack();
    else this.#report();
  }

  /** What may be acked: what the leader and every visible tab have handled. */
  get floor() {
    let floor = this.#pump.acked ?? this.#pump.start;
    for (const { visible, handled } of this.#tabs.values()) {
      if (visible) floor = floor === null || handled === null ? null : Math.min(floor, handled);
    }
    return floor;
  }

  // --- leading --------------------------------------------------------------------------------------

  #ask(steal = false) {
    const options = steal ? { steal } : { signal: this.#asking.signal };
    const asking = this.#asking;
    navigator.locks.request(this.#name, options, () => {
      if (asking !== this.#asking || asking.signal.aborted) return undefined;
      return new Promise((resolve) => { this.#release = resolve; this.#begin(); });
    }).catch(() => {}).finally(() => {
      if (asking.signal.aborted) return;
      // Stolen, or given up: another tab leads.
      this.#depose();
      if (!this.#over) this.#ask();
    });
  }

  async #begin() {
    const living = await this.#living();
    this.#term = Math.max(await this.#kept('term'), this.#term) + 1;
    this.#era = Math.max(await this.#kept('era'), this.#era);
    if (!this.#release) return;
    this.#keep('term', this.#term);
    this.#tabs.clear();
    for (const id of living) this.#tabs.set(id, { visible: true, handled: null });
    this.leads = true;
    this.announce();
    setTimeout(() => {
      for (const [id, tab] of this.#tabs) if (!tab.said) this.#tabs.delete(id);
      this.handled();
    }, REPORT_MS);
    this.#leading = this.#leading.then(() => (this.leads ? this.#hooks.lead() : undefined));
  }

  #depose() {
    const led = this.leads;
    this.leads = false;
    this.#release?.();
    this.#release = null;
    if (led) this.#hooks.drop();
  }

  #lead() {
    const { handled, received } = this.#pump;
    const since = handled === null ? null : Math.min(handled, this.floor ?? handled);
    return { term: this.#term, era: this.#era, since, received, ...this.#hooks.standing() };
  }

  #ack() {
    const { floor } = this;
    if (floor === null) return undefined;
    // A tab that was frozen may have lost its lock without having heard of it.
    return withValue(this.#store.get(`${this.#name}:term`), (kept) => {
      if (Number(kept) > this.#term) this.#depose();
      else if (this.leads) this.#hooks.ack(floor);
    });
  }

  async #living() {
    const { held } = await navigator.locks.query();
    const prefix = `${this.#name}:`;
    const ids = held.map(({ name }) => name.split(prefix)[1]);
    return ids.filter((id) => id && id !== this.#id);
  }

  async #prune() {
    const living = await this.#living();
    for (const id of this.#tabs.keys()) if (!living.includes(id)) this.#tabs.delete(id);
    this.#ack();
  }

  // --- time -------------------------------------------------------------------------------------------

  /** Once a second; `wasFrozen`: it comes much later. */
  look(wasFrozen) {
    const now = Date.now();
    if (!this.#channel) return;
    if (this.leads) {
      if (now - this.#beaten > BEAT_MS) this.beat();
      if (wasFrozen) this.#ack();
      if (this.floor !== this.#pump.acked && now - this.#pruned > PRUNE_MS) {
        this.#pruned = now;
        this.#prune();
      }
    } else if (wasFrozen) {
      this.#sign = now;
      this.#report(true);
    } else if (isVisible() && now - this.#sign > this.#silence) {
      this.#sign = now;
      this.#asking.abort();
      this.#asking = new AbortController();
      this.#ask(true);
    }
  }

  // --- the channel --------------------------------------------------------------------------------------

  #say(what) { try { this.#channel?.postMessage(what); } catch { /* it is closed */ } }

  #report(hello) {
    this.#say({ tab: this.#id, hello, visible: isVisible(), handled: this.#pump.acked ?? this.#pump.start, era: this.#era });
  }

  #heard(said) {
    if (!said) return undefined;
    if (typeof said.tab === 'string') return this.leads ? this.#hear(said) : undefined;
    if (said.forget || (this.leads && (said.wake || said.refresh))) return this.#hooks.asked(said);
    const term = said.lead?.term ?? said.term;
    if (!Number.isInteger(term) || term < this.#term || (this.leads && term === this.#term)) return undefined;
    if (this.leads) this.#depose();
    this.#term = term;
    this.#sign = Date.now();
    const channel = this.#channel;
    this.#chain = this.#chain.then(() => (channel === this.#channel && !this.leads ? this.#follow(said) : undefined))
      .catch((error) => this.#hooks.error(error, 'tabs'));
    return undefined;
  }

  /** As the leader, from a tab. */
  #hear({ tab, bye, hello, visible, handled, era }) {
    if (bye) this.#tabs.delete(tab);
    else {
      const position = era === this.#era && Number.isInteger(handled) ? handled : null;
      this.#tabs.set(tab, { visible: visible !== false, handled: position, said: true });
      if (hello) {
        // A tab without a position starts at the one that it is told.
        const lead = this.#lead();
        if (handled === null) this.#tabs.get(tab).handled = lead.since;
        this.#say({ lead });
      }
    }
    this.#ack();
  }

  /** As another tab, from the leader. */
  async #follow({ lead, message, gap, after, live, state, era }) {
    if (lead) {
      this.#silence = (lead.beat || 25_000) + GRACE_MS;
      if (lead.state) this.#hooks.follow(lead.state);
      if (!Number.isInteger(lead.since)) return;
      if (this.#pump.received === null) {
        this.#pump.begin(lead.since);
        this.#era = lead.era;
      }
      this.#missed(lead.era, lead.since);
      this.#report();
      await this.#level(lead.received);
    } else if (state) {
      this.#hooks.follow(state);
    } else {
      if (this.#pump.received === null) { this.#report(true); return; }
      if (gap?.reason === 'reset' && era === this.#era + 1) {
        this.#era = era;
        this.#pump.gap(gap);
        return;
      }
      this.#missed(era, after);
      await this.#level(after);
      if (message) this.#pump.put(message, live);
      if (gap) this.#pump.gap(gap);
    }
  }

  /** A reset that this tab did not hear. */
  #missed(era, since) {
    if (!(era > this.#era)) return;
    this.#era = era;
    this.#pump.gap({ after: this.#pump.received, before: since + 1, reason: 'reset' });
  }

  /** Reads what was missed, up to `to`. */
  async #level(to) {
    while (this.#channel && !this.leads && this.#pump.received < to) {
      let page;
      try { page = await this.#hooks.page(this.#pump.received); } catch (error) {
        this.#hooks.error(error, 'history');
        await pause(1_000);
        continue;
      }
      const gap = (before) => {
        const known = this.#pump.received;
        if (before > known + 1) this.#pump.gap({ after: known, before, reason: 'expired' });
      };
      for (const message of page.messages) {
        gap(message.seq);
        this.#pump.put(message, false);
      }
      if (page.next === null) gap(to + 1);
    }
  }

  async #kept(what) {
    try { return Number(await this.#store.get(`${this.#name}:${what}`)) || 0; } catch { return 0; }
  }

  async #keep(what, value) {
    try { await this.#store.set(`${this.#name}:${what}`, String(value)); } catch { /* a full quota */ }
  }
}

export const isVisible = () => globalThis.document?.visibilityState !== 'hidden';
