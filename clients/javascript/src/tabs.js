// `tabs: 'shared'`: one socket for all tabs of a user. Web Locks elect the tab that holds it (the leader); it hands what
// comes to the others over a BroadcastChannel, and acks what it and every visible tab have handled.
//
// What is said on the channel: the leader says `lead` (its term, and its positions by log), `message`, `gap` and `state`, each
// with its `term` and `era` (how many resets there were); a tab says `hello` and what it has handled, `bye`, `wake`,
// `refresh` and `forget`. Whatever else comes there is of another version, and ignored.

import { isVisible, pause } from './line.js';
import { logOf } from './pump.js';
import { withValue } from './positions.js';

/** How often the tabs that are waited for are looked at. */
const PRUNE_MS = 2_000;
const BEAT_MS = 5_000;
/** A leader that says nothing for its heartbeat and this has gone without a word. */
const GRACE_MS = 5_000;
/** How long a tab may take to say what it has handled before it is not waited for. */
const REPORT_MS = 1_000;

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
      for (const tab of this.#tabs.values()) tab.handled = {};
    }
    this.#say({ ...what, term: this.#term, era: this.#era });
  }

  beat() {
    this.#beaten = Date.now();
    // With it a tab sees what it has missed.
    this.announce();
  }

  ask(what) { this.#say({ [what]: true }); }

  /** This tab has handled more, or its visibility has changed. */
  handled() {
    if (this.leads) this.#ack();
    else this.#report();
  }

  /** What may be acked of a log: what the leader and every visible tab have handled. */
  floor(name, log) {
    const all = [log.acked ?? log.start];
    for (const { visible, handled } of this.#tabs.values()) if (visible) all.push(handled[name]);
    return all.every(Number.isInteger) ? Math.min(...all) : null;
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
    for (const id of living) this.#tabs.set(id, { visible: true, handled: {} });
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
    const logs = {};
    for (const [name, log] of this.#pump.logs) {
      const { handled, received } = log;
      logs[name] = [Math.min(handled, this.floor(name, log) ?? handled), received];
    }
    return { term: this.#term, era: this.#era, logs, ...this.#hooks.standing() };
  }

  #ack() {
    // A tab that was frozen may have lost its lock without having heard of it.
    return withValue(this.#store.get(`${this.#name}:term`), (kept) => {
      if (Number(kept) > this.#term) this.#depose();
      else if (this.leads) this.#hooks.ack();
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
      const isBehind = ([name, log]) => this.floor(name, log) !== (log.acked ?? log.start);
      if ([...this.#pump.logs].some(isBehind) && now - this.#pruned > PRUNE_MS) {
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
    const handled = {};
    for (const [name, log] of this.#pump.logs) handled[name] = log.acked ?? log.start;
    this.#say({ tab: this.#id, hello, visible: isVisible(), handled, era: this.#era });
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
      if (hello) this.announce();
      this.#tabs.set(tab, { visible: visible !== false, handled: era === this.#era ? handled ?? {} : {}, said: true });
    }
    this.#ack();
  }

  /** As another tab, from the leader. */
  async #follow({ lead, message, gap, after, live, state, era }) {
    if (lead) {
      this.#silence = (lead.beat || 25_000) + GRACE_MS;
      if (lead.state) this.#hooks.follow(lead.state);
      for (const [name, [since, received]] of Object.entries(lead.logs)) {
        const isKnown = this.#pump.logs.has(name);
        const log = this.#pump.open(name, since);
        // A reset that this tab did not hear.
        if (isKnown && lead.era > this.#era) {
          this.#pump.gap(this.#of(name, { after: log.received, before: since + 1, reason: 'reset' }));
        }
        await this.#level(name, received);
      }
      this.#era = lead.era;
      this.#report();
      return;
    }
    if (state) return this.#hooks.follow(state);
    const frame = message ?? gap;
    if (gap?.reason === 'reset' && era === this.#era + 1) {
      this.#era = era;
      this.#pump.open(logOf(gap), gap.before - 1);
    } else if (era !== this.#era || !this.#pump.logs.has('')) return this.#report(true);
    else {
      this.#pump.open(logOf(frame), after);
      await this.#level(logOf(frame), after);
    }
    if (message) this.#pump.put(message, live);
    else this.#pump.gap(gap);
  }

  /** A frame, of this log. */
  #of(topic, frame) { return topic === 'everyone' ? { ...frame, everyone: true } : { ...frame, topic }; }

  /** Reads what was missed of a log, up to `to`. */
  async #level(name, to) {
    const log = this.#pump.logs.get(name);
    while (this.#channel && !this.leads && log.received < to) {
      const gap = (before) => {
        const { received: after } = log;
        if (before > after + 1) this.#pump.gap(this.#of(name, { after, before, reason: 'expired' }));
      };
      let page;
      try { page = await this.#hooks.page(log.received, name); } catch (error) {
        // The user has left the topic meanwhile.
        if (name && (error.status === 403 || error.status === 404)) return this.#pump.drop(name);
        this.#hooks.error(error, 'history');
        await pause(1_000);
        continue;
      }
      for (const message of page.messages) {
        gap(message.seq);
        this.#pump.put(this.#of(name, message), false);
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
