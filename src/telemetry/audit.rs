//! The audit log: who did what to whom. It contains no payload, and no secret.

use std::io::Write;

use tracing_subscriber::fmt::format::Writer;
use tracing_subscriber::fmt::time::{FormatTime, SystemTime};

use super::AUDIT_LINES;

/// The target of the audit log. A filter of the log that does not name it leaves it on:
/// `ringpush::audit=off` turns it off.
pub const AUDIT: &str = "ringpush::audit";

/// Writes one line for an act that changes something for somebody, or that reads another's
/// messages. Each line is a JSON object, whatever form the log has; `fields` are names and values.
pub fn audit(act: &str, fields: &[(&str, &str)]) {
    if !tracing::enabled!(target: AUDIT, tracing::Level::INFO) {
        return;
    }
    if let Some(mut lines) = AUDIT_LINES.get().cloned() {
        let mut at = String::new();
        // The time as the other lines have it. Memory takes every text, and the queue every line.
        let _ = SystemTime.format_time(&mut Writer::new(&mut at));
        let _ = lines.write_all(line(&at, act, fields).as_bytes());
    }
}

fn line(at: &str, act: &str, fields: &[(&str, &str)]) -> String {
    let text = |text: &str| serde_json::Value::from(text).to_string();
    let mut line = format!(r#"{{"timestamp":"{at}","level":"INFO","target":"{AUDIT}","act":{}"#, text(act));
    for (name, value) in fields {
        line.push_str(&format!(",{}:{}", text(name), text(value)));
    }
    line.push_str("}\n");
    line
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_line_is_one_json_object() {
        let written =
            line("1970-01-01T00:00:00.000000Z", "disconnect_user", &[("user", "a\"\n用户"), ("key", "k")]);
        assert_eq!(written.matches('\n').count(), 1);
        let read: serde_json::Value = serde_json::from_str(&written).unwrap();
        assert_eq!(read["timestamp"], "1970-01-01T00:00:00.000000Z");
        assert_eq!((&read["target"], &read["act"]), (&AUDIT.into(), &"disconnect_user".into()));
        assert_eq!((&read["user"], &read["key"]), (&"a\"\n用户".into(), &"k".into()));
    }
}
