//! The trace that a message belongs to, as its sender named it (W3C Trace Context, `traceparent`,
//! <https://www.w3.org/TR/trace-context/>).

use std::fmt;

/// Bytes of a `traceparent` of version 00.
const LENGTH: usize = 55;

/// A trace and the span in it that published a message.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct TraceParent {
    trace: u128,
    parent: u64,
    flags: u8,
}

impl TraceParent {
    /// Bytes of [`TraceParent::to_bytes`].
    pub const BYTES: usize = 25;

    /// Parses the value of the header. A later version than 00 is read as 00, as the standard has
    /// it. Returns `None` for anything that breaks its rules.
    #[must_use]
    pub fn parse(text: &str) -> Option<Self> {
        let bytes = text.as_bytes();
        let fields = bytes.get(..LENGTH)?;
        let version = hex(&fields[..2])?;
        let more = &bytes[LENGTH..];
        let is_known = version == 0 && more.is_empty();
        let is_later = (1..0xff).contains(&version) && more.first().is_none_or(|byte| *byte == b'-');
        if !(is_known || is_later) || [2, 35, 52].iter().any(|at| fields[*at] != b'-') {
            return None;
        }
        let trace = hex(&fields[3..35])?;
        let parent = u64::try_from(hex(&fields[36..52])?).ok()?;
        let flags = u8::try_from(hex(&fields[53..55])?).ok()?;
        (trace != 0 && parent != 0).then_some(Self { trace, parent, flags })
    }

    /// The form in which it is stored.
    #[must_use]
    pub fn to_bytes(self) -> [u8; Self::BYTES] {
        let mut bytes = [0; Self::BYTES];
        bytes[..16].copy_from_slice(&self.trace.to_be_bytes());
        bytes[16..24].copy_from_slice(&self.parent.to_be_bytes());
        bytes[24] = self.flags;
        bytes
    }

    /// The stored form; `None` if it is none.
    #[must_use]
    pub fn from_bytes(bytes: &[u8]) -> Option<Self> {
        let bytes: &[u8; Self::BYTES] = bytes.try_into().ok()?;
        let (trace, rest) = bytes.split_first_chunk::<16>()?;
        let (parent, flags) = rest.split_first_chunk::<8>()?;
        let (trace, parent) = (u128::from_be_bytes(*trace), u64::from_be_bytes(*parent));
        (trace != 0 && parent != 0).then_some(Self { trace, parent, flags: flags[0] })
    }
}

/// The header's value, in version 00.
impl fmt::Display for TraceParent {
    fn fmt(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(out, "00-{:032x}-{:016x}-{:02x}", self.trace, self.parent, self.flags)
    }
}

/// A number in lower-case hexadecimal digits; the standard allows no others.
fn hex(digits: &[u8]) -> Option<u128> {
    digits.iter().try_fold(0, |number, byte| {
        let digit = match byte {
            b'0'..=b'9' => byte - b'0',
            b'a'..=b'f' => byte - b'a' + 10,
            _ => return None,
        };
        Some(number << 4 | u128::from(digit))
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const GOOD: &str = "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01";

    #[test]
    fn what_breaks_the_standard_is_none() {
        assert_eq!(TraceParent::parse(GOOD).unwrap().to_string(), GOOD);
        let later = format!("cc{}-what-comes", &GOOD[2..]);
        assert_eq!(TraceParent::parse(&later).unwrap().to_string(), GOOD);
        for bad in [
            "",
            "00",
            &GOOD.to_uppercase(),
            &format!("ff{}", &GOOD[2..]),
            &format!("{GOOD}-more"),
            &format!("{GOOD} "),
            &format!("cc{}.more", &GOOD[2..]),
            &GOOD.replace("4bf92f3577b34da6a3ce929d0e0e4736", &"0".repeat(32)),
            &GOOD.replace("00f067aa0ba902b7", &"0".repeat(16)),
            &GOOD.replace('-', "_"),
            &GOOD.replace("4bf9", "用户"),
        ] {
            assert_eq!(TraceParent::parse(bad), None, "{bad:?}");
        }
        assert_eq!(TraceParent::from_bytes(&[0; 25]), None);
        assert_eq!(TraceParent::from_bytes(&[1; 24]), None);
    }

    proptest! {
        #[test]
        fn every_trace_comes_back_as_it_was(trace in 1u128.., parent in 1u64.., flags: u8) {
            let made = TraceParent { trace, parent, flags };
            prop_assert_eq!(TraceParent::parse(&made.to_string()), Some(made));
            prop_assert_eq!(TraceParent::from_bytes(&made.to_bytes()), Some(made));
        }

        #[test]
        fn no_text_is_too_strange(text in ".{0,80}") {
            let _ = TraceParent::parse(&text);
        }
    }
}
