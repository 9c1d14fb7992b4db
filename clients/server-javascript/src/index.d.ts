/** A user, several, or the form of the HTTP interface. `except`: users who do not get it all the same. */
export type Recipients =
  | string
  | string[]
  | { user: string }
  | { users: string[] }
  | { topic: string; except?: string[] }
  | { topics: string[]; except?: string[] }
  | { everyone: true; except?: string[] };

export interface PublishOptions {
  /** The id under which a repeat is stored once. Default: a new one, kept through the retries of this call. */
  id?: string;
  /** What the message tells: 1 to 64 of `[A-Za-z0-9._:-]`. */
  event?: string;
  /** Its life in seconds, 1 s to 30 d. */
  ttl_s?: number;
  signal?: AbortSignal;
}

interface Refusal {
  status: number;
  detail?: string;
}

/** The outcome for one user. */
export type UserAccepted = { user: string; seq: number; duplicate: boolean } | { user: string; error: Refusal };

/**
 * The outcome for one topic. Of an `inbox` topic: the members that the message is for, in how many inboxes it is, and who
 * does not have it. Of a log: the number of the message there.
 */
export type TopicAccepted =
  | { topic: string; members: number; stored: number; failed: { user: string; error: Refusal }[] }
  | { topic: string; seq: number; duplicate: boolean }
  | { topic: string; error: Refusal };

/** The outcome for everyone: the number of the message in that log. */
export type EveryoneAccepted = { everyone: true; seq: number; duplicate: boolean } | { everyone: true; error: Refusal };

export type Accepted = UserAccepted | TopicAccepted | EveryoneAccepted;

/** What `to` is answered with. */
type AcceptedOf<T> = T extends { topic: string } | { topics: string[] }
  ? TopicAccepted
  : T extends { everyone: true }
    ? EveryoneAccepted
    : UserAccepted;

export interface Published<A = Accepted> {
  id: string;
  accepted: A[];
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
  /** The topic by which it came into an inbox. */
  via?: string;
  /** The topic in whose log it is. */
  topic?: string;
  /** It is in the log of everyone. */
  everyone?: true;
  traceparent?: string;
  payload: unknown;
  accepted_at: string;
  expires_at: string;
}

export interface User {
  user: string;
  owner: string | null;
  online: boolean;
  head: number | null;
  devices: { device: string; acked: number; connected_at: string | null; node: string | null; client?: string; lag: number }[];
}

/** What became of a message on each device of its user. */
export interface MessageStatus {
  seq: number;
  id: string;
  accepted_at: string;
  expires_at: string;
  event?: string;
  via?: string;
  traceparent?: string;
  state: 'waiting' | 'acked' | 'expired';
  devices: { device: string; online: boolean; node?: string; sent: boolean | null; acked: boolean }[];
}

export interface Topic {
  topic: string;
  delivery: 'inbox' | 'log';
  ttl_s: number;
  created_at: string;
}

export interface MembersChanged {
  added: number;
  removed: number;
  refused: { user: string; detail: string }[];
}

interface Until {
  signal?: AbortSignal;
}

/** Where a page of messages begins: after a number, oldest first, or of a log before one, newest first. */
interface PageOf {
  after?: number;
  limit?: number;
}

interface PageOfLog extends PageOf {
  before?: number;
}

interface History {
  messages: StoredMessage[];
  next: number | null;
}

/** Speaks to collect. Each call tries again, under the same id, after 429, 502, 503, 504 and lost answers. */
export class Ringpush {
  constructor(options: { url: string | URL; key: string; fetch?: typeof fetch });
  /** Resolves when the message is on stable storage for every recipient. */
  publish<T extends Recipients>(to: T, payload: unknown, options?: PublishOptions): Promise<Published<AcceptedOf<T>>>;
  /** Each message stands alone: its outcome, or its problem. */
  publishMany(
    messages: ({ to: Recipients; payload: unknown } & Omit<PublishOptions, 'signal'>)[],
    options?: Until,
  ): Promise<(Published | { error: Problem })[]>;
  user(user: string, options?: Until): Promise<User>;
  history(user: string, options?: PageOf & Until): Promise<History>;
  /** What became of a message, named by its number or by the id that its sender gave it. */
  status(user: string, message: number | string, options?: Until): Promise<MessageStatus>;
  /** Closes the user's sockets and refuses every token issued until now. */
  disconnect(user: string, options?: Until): Promise<void>;
  /** Forgets a user: memberships and cursors go, messages are shown no more, sockets are closed. */
  forget(user: string, options?: Until): Promise<void>;
  topicsOf(user: string, options?: Until): Promise<{ topics: Topic[]; next: null }>;
  /** Ends all memberships of a user. */
  leaveTopics(user: string, options?: Until): Promise<void>;
  /** Makes a topic, an `inbox` one if nothing is said, or changes the life of its messages in seconds. */
  createTopic(topic: string, options?: { delivery?: 'inbox' | 'log'; ttl_s?: number } & Until): Promise<Topic>;
  topics(options?: { after?: string; limit?: number } & Until): Promise<{ topics: Topic[]; next: string | null }>;
  /** `head` and `online`, the sockets that read it, are those of a log. */
  topic(topic: string, options?: Until): Promise<Topic & { members: number; head?: number; online?: number }>;
  /** Ends a topic and its memberships. */
  deleteTopic(topic: string, options?: Until): Promise<void>;
  /** At most 10,000 users together. Who is published to afterwards are the members that it has left. */
  changeMembers(topic: string, change: { add?: string[]; remove?: string[] } & Until): Promise<MembersChanged>;
  members(topic: string, options?: { after?: string; limit?: number } & Until): Promise<{ members: string[]; next: string | null }>;
  topicHistory(topic: string, options?: PageOfLog & Until): Promise<History>;
  everyoneHistory(options?: PageOfLog & Until): Promise<History>;
  /** Ends a message of a log now, for whoever has not been sent it. */
  endMessage(topic: string, seq: number, options?: Until): Promise<void>;
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
