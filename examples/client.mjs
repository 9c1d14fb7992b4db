import { createRequire } from 'node:module';
const WebSocket = createRequire(import.meta.url)('ws'); // in a browser: the WebSocket that is there

let last; // come back after every break, and go on after the last message
function listen(url, token) {
  const socket = new WebSocket(url, 'ringpush.v1.json');
  socket.onopen = () => socket.send(JSON.stringify({ type: 'auth', token, device: 'node', since: last }));
  socket.onmessage = ({ data }) => {
    const frame = JSON.parse(data);
    if (frame.type !== 'message') return;
    console.log(JSON.stringify(frame.payload));
    last = frame.seq;
    socket.send(JSON.stringify({ type: 'ack', seq: last }));
  };
  socket.onerror = () => {}; // a close follows
  socket.onclose = ({ code }) => {
    if (code < 4500) setTimeout(() => listen(url, token), Math.random() * 1000); // 4500 and above: do not come back
  };
}

listen(process.env.RINGPUSH_URL, process.env.RINGPUSH_TOKEN);
