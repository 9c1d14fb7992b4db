//! The scripts that read and write the registry, with the names of its keys.

use crate::transport::redis::Script;

/// The names of the keys, and the scripts that use them.
pub(super) struct Keys {
    pub(super) names: [String; 5],
    pub(super) channel: String,
    pub(super) beat: Script,
    pub(super) snapshot: Script,
    pub(super) leave: Script,
}

impl Keys {
    pub(super) fn of(prefix: &str) -> Self {
        let shared = include_str!("../lua/shared.lua");
        let script = |own: &str| Script::new(&format!("{shared}\n{own}"));
        Self {
            names: ["nodes", "info", "meta", "incarnations", "counts"]
                .map(|name| format!("{{{prefix}}}:{name}")),
            channel: format!("{{{prefix}}}:changed"),
            beat: script(include_str!("../lua/beat.lua")),
            snapshot: script(include_str!("../lua/snapshot.lua")),
            leave: script(include_str!("../lua/leave.lua")),
        }
    }
}
