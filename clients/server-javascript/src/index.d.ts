/** A user, several, or the form of the HTTP interface. */
export type Recipients = string | string[] | { user: string } | { users: string[] };

export interface PublishOptions {
  /** The id under which a repeat is stored once. Default: a new one, kept through the retries of this call. */
  id?: string;
  /** What the message tells: 1 to 64 of `[A-Za-z0-9._:-]`. */
  event?: string;
  /** Its life in seconds, 1 s to 30 d. */
  ttl_s?: number;
  signal?: AbortSignal;
}

export type Accepted =
  | { user: string; seq: number; duplicate: boolean }
  | { user: string; error: { status: number; detail?: string } };

export interface Published {
  id: string;
  accepted: Accepted[];
}

/** An error as in RFC 9457. */
export interface Problem {
  type: string;
  title: string;
  status: number;
  detail: string;
  reason?: string;
  id?: string;
  accepted?: Accepted[];
  errors?: { pointer: string; detail: string }[];
}

export interface StoredMessage {
  seq: number;
  id: string;
  event?: string;
  payload: unknown;
  accepted_at: string;
  expires_at: string;
}

export interface User {
  user: string;
  owner: string | null;
  online: boolean;
  head: number | null;
  devices: { device: string; acked: number; connected_at: string | null; node: string | null; client?: string }[];
}

interface Until {
  signal?: AbortSignal;
}

/** Speaks to collect. Each call tries again, under the same id, after 429, 502, 503, 504 and lost answers. */
export class Ringpush {
  constructor(options: { url: string | URL; key: string; fetch?: typeof fetch });
  /** Resolves when the message is on stable storage for every recipient. */
  publish(to: Recipients, payload: unknown, options?: PublishOptions): Promise<Published>;
  /** Each message stands alone: its outcome, or its problem. */
  publishMany(
    messages: ({ to: Recipients; payload: unknown } & Omit<PublishOptions, 'signal'>)[],
    options?: Until,
  ): Promise<(Published | { error: Problem })[]>;
  user(user: string, options?: Until): Promise<User>;
  history(user: string, options?: { after?: number; limit?: number } & Until): Promise<{ messages: StoredMessage[]; next: number | null }>;
  /** Closes the user's sockets and refuses every token issued until now. */
  disconnect(user: string, options?: Until): Promise<void>;
  cluster(options?: Until): Promise<Record<string, unknown>>;
}

export class PublishError extends Error {
  /** The HTTP status; 0 where no answer came. */
  readonly status: number;
  /** A repeat under this id is safe. */
  readonly id?: string;
  readonly problem?: Problem;
  readonly retryable: boolean;
}
