/** Thrown by `token`: there will be no token; the client stops. */
export class Refused extends Error {
  constructor(message = 'no token', options) {
    super(message, options);
    this.name = 'Refused';
  }
}

/** What went wrong; `retryable`: the client goes on by itself. */
export class RingpushError extends Error {
  constructor(code, message, retryable = true, options) {
    super(message, options);
    this.name = 'RingpushError';
    this.code = code;
    this.retryable = retryable;
  }

  static from(code, error, retryable) {
    if (error instanceof RingpushError) return error;
    return new RingpushError(code, error?.message ?? String(error), retryable, { cause: error });
  }

  /** The problem that a server answered. */
  static async of(answer) {
    const problem = await answer.json().catch(() => ({}));
    const error = new RingpushError(problem.reason ?? `http_${answer.status}`, problem.detail ?? answer.statusText,
      answer.status === 429 || answer.status >= 500);
    error.status = answer.status;
    error.reason = problem.reason;
    const seconds = Number(answer.headers.get('retry-after'));
    if (seconds > 0) error.retryAfterMs = seconds * 1000;
    return error;
  }
}
