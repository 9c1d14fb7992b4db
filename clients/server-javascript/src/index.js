// Publishing to ringpush: see index.d.ts for what each thing is and does.

const TRIES = 8;
const RETRY_MAX_MS = 10_000;
const DEADLINE_MS = 15_000;
/** Longest `Retry-After` that is believed: a day. */
const RETRY_AFTER_MAX_S = 86_400;
/** Answers after which the same request may succeed. */
const AGAIN = new Set([429, 502, 503, 504]);

export class PublishError extends Error {
  constructor(message, { status = 0, id, problem, cause } = {}) {
    super(message, { cause });
    this.name = 'PublishError';
    this.status = status;
    this.id = id;
    this.problem = problem;
    this.retryable = status === 0 || AGAIN.has(status);
  }
}

export class Ringpush {
  #base; #key; #fetch;

  constructor({ url, key, fetch = globalThis.fetch }) {
    if (!url || !key) throw new TypeError('Ringpush: "url" (of collect) and "key" (an API key) are required');
    this.#base = new URL(url);
    this.#base.pathname = this.#base.pathname.replace(/\/*$/, '/');
    this.#key = key;
    this.#fetch = fetch;
  }

  async publish(to, payload, { id = crypto.randomUUID(), event, ttl_s: ttl, signal } = {}) {
    const body = message({ to, payload, id, event, ttl_s: ttl });
    const answer = await this.#call('POST', 'v1/messages', { body, id, signal });
    return { id: answer.id, accepted: answer.accepted };
  }

  async publishMany(messages, { signal } = {}) {
    const all = messages.map((one) => message({ id: crypto.randomUUID(), ...one }));
    const results = [];
    for (let from = 0; from < all.length; from += 1000) {
      const body = { messages: all.slice(from, from + 1000) };
      const answer = await this.#call('POST', 'v1/messages/batch', { body, signal });
      results.push(...answer.results);
    }
    // What was not stored for now goes again, alone, under its id.
    await Promise.all(results.map(async (result, n) => {
      if (!result.error || !AGAIN.has(result.error.status)) return;
      const answer = await this.#call('POST', 'v1/messages', { body: all[n], id: all[n].id, signal });
      results[n] = { id: answer.id, accepted: answer.accepted };
    }));
    return results;
  }

  user(user, { signal } = {}) {
    return this.#call('GET', userPath(user), { signal });
  }

  history(user, { signal, ...page } = {}) { return this.#call('GET', `${userPath(user)}/messages${query(page)}`, { signal }); }

  status(user, message, { signal } = {}) {
    return this.#call('GET', `${userPath(user)}/messages/${encodeURIComponent(message)}/status`, { signal });
  }

  async disconnect(user, { signal } = {}) { await this.#call('DELETE', `${userPath(user)}/sessions`, { signal }); }

  async forget(user, { signal } = {}) { await this.#call('DELETE', userPath(user), { signal }); }

  topicsOf(user, { signal } = {}) { return this.#call('GET', `${userPath(user)}/topics`, { signal }); }

  async leaveTopics(user, { signal } = {}) { await this.#call('DELETE', `${userPath(user)}/topics`, { signal }); }

  /** Makes a topic, or changes the life of its messages. */
  createTopic(topic, { delivery, ttl_s: ttl, signal } = {}) {
    return this.#call('PUT', topicPath(topic), { body: { delivery, ttl_s: ttl }, signal });
  }

  topics({ signal, ...page } = {}) { return this.#call('GET', `v1/topics${query(page)}`, { signal }); }

  topic(topic, { signal } = {}) { return this.#call('GET', topicPath(topic), { signal }); }

  async deleteTopic(topic, { signal } = {}) { await this.#call('DELETE', topicPath(topic), { signal }); }

  /** A repeat is harmless, and counts whom it still had to add or remove. */
  changeMembers(topic, { add = [], remove = [], signal } = {}) {
    return this.#call('POST', `${topicPath(topic)}/members`, { body: { add, remove }, signal });
  }

  members(topic, { signal, ...page } = {}) { return this.#call('GET', `${topicPath(topic)}/members${query(page)}`, { signal }); }

  topicHistory(topic, { signal, ...page } = {}) { return this.#call('GET', `${topicPath(topic)}/messages${query(page)}`, { signal }); }

  everyoneHistory({ signal, ...page } = {}) { return this.#call('GET', `v1/everyone/messages${query(page)}`, { signal }); }

  async endMessage(topic, seq, { signal } = {}) { await this.#call('DELETE', `${topicPath(topic)}/messages/${seq}`, { signal }); }

  cluster({ signal } = {}) {
    return this.#call('GET', 'v1/cluster', { signal });
  }

  /** Tries again, under the same id, where that is safe. */
  async #call(method, path, { body, id, signal }) {
    const headers = { authorization: `Bearer ${this.#key}` };
    if (body) headers['content-type'] = 'application/json';
    for (let tries = 1; ; tries += 1) {
      signal?.throwIfAborted();
      let wait = Math.random() * Math.min(RETRY_MAX_MS, 100 * 2 ** tries);
      let fault;
      try {
        const late = AbortSignal.timeout(DEADLINE_MS);
        const answer = await this.#fetch(new URL(path, this.#base), {
          method, headers, body: body && JSON.stringify(body), signal: signal ? AbortSignal.any([signal, late]) : late,
        });
        if (answer.ok) return await answer.json();
        const problem = await answer.json().catch(() => ({}));
        fault = new PublishError(problem.detail ?? `answered ${answer.status}`, { status: answer.status, id, problem });
        const after = Math.min(Number(answer.headers.get('retry-after')), RETRY_AFTER_MAX_S);
        if (after > 0) wait = Math.max(wait, after * 1000);
      } catch (cause) {
        signal?.throwIfAborted();
        fault = new PublishError(`cannot be reached: ${cause.message}`, { id, cause });
      }
      if (!fault.retryable || tries >= TRIES) throw fault;
      await new Promise((resolve) => { setTimeout(resolve, wait); });
    }
  }
}

const userPath = (user) => `v1/users/${encodeURIComponent(user)}`;
const topicPath = (topic) => `v1/topics/${encodeURIComponent(topic)}`;

/** The part of a page as a query: `after`, `before`, `limit`. */
function query(page) {
  const given = Object.entries(page).filter(([, value]) => value !== undefined && value !== null);
  return given.length > 0 ? `?${new URLSearchParams(given)}` : '';
}

function message({ to, ...rest }) {
  const recipients = typeof to === 'string' ? { user: to } : Array.isArray(to) ? { users: to } : to;
  return { to: recipients, ...rest };
}
