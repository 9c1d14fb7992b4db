//! What a newcomer is shown at start.

use super::App;
use super::keys::Keys;
use crate::secret::page_code;

impl App {
    /// What a newcomer is shown: how to try it, and the keys of development.
    #[must_use]
    pub fn greeting(&self, program: &str) -> String {
        let at = |name: &str| self.bound.of(name).map_or_else(String::new, |at| at.to_string());
        let page = self.bound.push.first().map_or_else(String::new, |(_, at)| at.to_string());
        let pushes: Vec<String> = self
            .bound
            .push
            .iter()
            .map(|(node, at)| format!("{node} {}://{at}/v1/ws", self.bound.scheme("push", "ws", "wss")))
            .collect();
        let code = if self.keys.self_made {
            format!("?code={}", page_code(&self.keys.peer_secret))
        } else {
            String::new()
        };
        let Keys { token_key, api_key, admin_key, peer_secret, .. } = self.keys.to_show();
        format!(
            "ringpush {version} is ready: development, embedded store\n\n\
             \x20 page    {push_scheme}://{page}/{code}\n\
             \x20 token   {program} token alice\n\
             \x20 curl    curl {collect_scheme}://{collect}/v1/messages -H 'Authorization: Bearer {api_key}' \
             -H 'Content-Type: application/json' -d '{{\"to\":{{\"user\":\"alice\"}},\"payload\":{{\"text\":\"hello\"}}}}'\n\n\
             \x20 push     {pushes}\n\
             \x20 collect  {collect_scheme}://{collect}   api key      {api_key}\n\
             \x20 auth     http://{auth}   admin key    {admin_key}\n\
             \x20 dispatch http://{dispatch}   token key    {token_key}\n\
             \x20 ops      http://{ops}   peer secret  {peer_secret}\n",
            version = env!("CARGO_PKG_VERSION"),
            push_scheme = self.bound.scheme("push", "http", "https"),
            collect_scheme = self.bound.scheme("collect", "http", "https"),
            pushes = pushes.join("\n           "),
            collect = at("collect"),
            auth = at("auth"),
            dispatch = at("dispatch"),
            ops = at("ops"),
        )
    }
}
