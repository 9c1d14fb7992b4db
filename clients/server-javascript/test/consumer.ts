// Compiled by `tsc --strict`, never run.
import { PublishError, Ringpush, type Published } from '@ringpush/server';

const ringpush = new Ringpush({ url: new URL('https://collect.example.com'), key: 'k' });
export async function publish(): Promise<number> {
  try {
    const published: Published = await ringpush.publish(['alice', 'bob'], { n: 1 }, { event: 'x', signal: AbortSignal.timeout(1) });
    for (const one of published.accepted) if ('seq' in one) return one.seq;
    const { accepted } = await ringpush.publish({ topic: 'news', except: ['bob'] }, 1);
    for (const one of accepted) if ('members' in one && one.stored < one.members) return one.failed.length;
    for (const one of accepted) if ('seq' in one) return one.seq;
    const everyone = await ringpush.publish({ everyone: true }, 1);
    for (const one of everyone.accepted) if ('seq' in one && one.everyone) return one.seq;
    const { head } = await ringpush.topic((await ringpush.createTopic('feed', { delivery: 'log' })).topic);
    if (head) return (await ringpush.topicHistory('feed', { before: head })).messages.length;
    // @ts-expect-error there is no such recipient
    await ringpush.publish({ topicc: 'x' }, 1);
    const results = await ringpush.publishMany([{ to: 'alice', payload: 1, id: 'x' }]);
    return results.filter((result) => 'error' in result).length;
  } catch (error) {
    if (error instanceof PublishError && error.retryable) return error.status;
    throw error;
  }
}
