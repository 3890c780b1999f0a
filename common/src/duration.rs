//! Durations as people write them: `30s`, `1h30m`, `100ms`.
//!
//! A number without a unit is rejected, since seconds and milliseconds are easily confused.

use std::fmt;
use std::time::Duration;

use serde::de;

/// The text is not a duration.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Error {
    /// A number without a unit.
    #[error("`{text}` has no unit; write `{text}s` for seconds")]
    NoUnit {
        /// The text.
        text: String,
    },
    /// Not a sequence of numbers with units.
    #[error(
        "`{text}` is not a duration; write integers with the units d, h, m, s or ms, the largest first, such as `1h30m`"
    )]
    Malformed {
        /// The text, shortened if it is long.
        text: String,
    },
    /// The duration exceeds the range of [`Duration`].
    #[error("`{text}` is too long for a duration")]
    TooLong {
        /// The text, shortened if it is long.
        text: String,
    },
}

/// The units with their length in nanoseconds, in the order in which they must appear in a text.
const UNITS: [(&str, u128); 7] = [
    ("d", 86_400_000_000_000),
    ("h", 3_600_000_000_000),
    ("m", 60_000_000_000),
    ("s", 1_000_000_000),
    ("ms", 1_000_000),
    ("us", 1_000),
    ("ns", 1),
];

/// Parses a duration: one or more integers, each with a unit (`d`, `h`, `m`, `s`, `ms`, `us`, `ns`), the largest unit
/// first and no unit twice.
///
/// # Errors
/// [`Error`], whose text includes the remedy.
pub fn parse(text: &str) -> Result<Duration, Error> {
    let shown = || text.chars().take(40).collect::<String>();
    let is_number = |c: char| c.is_ascii_digit();
    if !text.is_empty() && text.chars().all(is_number) {
        return Err(Error::NoUnit { text: shown() });
    }
    let mut nanoseconds: u128 = 0;
    let mut units = UNITS.as_slice();
    let mut rest = text;
    loop {
        let malformed = || Error::Malformed { text: shown() };
        let (number, tail) = rest.split_at(rest.find(|c| !is_number(c)).ok_or_else(malformed)?);
        let (unit, tail) = tail.split_at(tail.find(is_number).unwrap_or(tail.len()));
        let unit_idx = units.iter().position(|(name, _)| *name == unit).ok_or_else(malformed)?;
        if number.is_empty() {
            return Err(malformed());
        }
        let too_long = || Error::TooLong { text: shown() };
        let number: u64 = number.parse().map_err(|_| too_long())?;
        nanoseconds += u128::from(number) * units[unit_idx].1;
        if tail.is_empty() {
            let seconds = u64::try_from(nanoseconds / 1_000_000_000).map_err(|_| too_long())?;
            let below = u32::try_from(nanoseconds % 1_000_000_000).expect("a remainder of 10^9 fits in 32 bits");
            return Ok(Duration::new(seconds, below));
        }
        units = &units[unit_idx + 1..];
        rest = tail;
    }
}

/// Formats a duration as the shortest text that [`parse`] reads without loss. Zero is `0s`.
pub fn format(duration: Duration) -> String {
    let mut rest = duration.as_nanos();
    let mut text = String::new();
    for (name, nanoseconds) in UNITS {
        let count = rest / nanoseconds;
        rest %= nanoseconds;
        if count > 0 {
            text.push_str(&format!("{count}{name}"));
        }
    }
    if text.is_empty() { "0s".to_owned() } else { text }
}

/// Durations as text in serialized data: `#[serde(with = "duration::text")]`.
pub mod text {
    use std::time::Duration;

    use serde::{Deserializer, Serializer};

    /// Writes the text of [`format`](super::format).
    ///
    /// # Errors
    /// Those of the serializer.
    pub fn serialize<S: Serializer>(duration: &Duration, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.serialize_str(&super::format(*duration))
    }

    /// Reads a text for [`parse`](super::parse).
    ///
    /// # Errors
    /// Those of the deserializer and [`Error`](super::Error).
    pub fn deserialize<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Duration, D::Error> {
        deserializer.deserialize_any(super::TextVisitor)
    }
}

/// Optional durations as text in serialized data: `#[serde(default, with = "duration::optional_text")]`.
pub mod optional_text {
    use std::time::Duration;

    use serde::{Deserialize, Deserializer, Serializer};

    /// Writes the text, or `None`.
    ///
    /// # Errors
    /// Those of the serializer.
    pub fn serialize<S: Serializer>(duration: &Option<Duration>, serializer: S) -> Result<S::Ok, S::Error> {
        match duration {
            Some(duration) => serializer.serialize_some(&super::format(*duration)),
            None => serializer.serialize_none(),
        }
    }

    /// Reads a text, or `None`.
    ///
    /// # Errors
    /// Those of the deserializer and [`Error`](super::Error).
    pub fn deserialize<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Option<Duration>, D::Error> {
        #[derive(Deserialize)]
        struct Text(#[serde(with = "super::text")] Duration);
        Ok(Option::<Text>::deserialize(deserializer)?.map(|text| text.0))
    }
}

/// Also accepts numbers, to reject them with the remedy.
struct TextVisitor;

impl de::Visitor<'_> for TextVisitor {
    type Value = Duration;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a duration such as `30s`")
    }

    fn visit_str<E: de::Error>(self, text: &str) -> Result<Duration, E> {
        parse(text).map_err(E::custom)
    }

    fn visit_u64<E: de::Error>(self, number: u64) -> Result<Duration, E> {
        Err(E::custom(Error::NoUnit { text: number.to_string() }))
    }

    fn visit_i64<E: de::Error>(self, number: i64) -> Result<Duration, E> {
        self.visit_str(&number.to_string())
    }

    fn visit_f64<E: de::Error>(self, number: f64) -> Result<Duration, E> {
        Err(E::custom(Error::Malformed { text: number.to_string() }))
    }
}

#[cfg(test)]
mod tests {
    use serde::{Deserialize, Serialize};

    use super::*;

    #[test]
    fn durations_round_trip_through_their_texts() {
        for (text, milliseconds) in [
            ("30s", 30_000),
            ("100ms", 100),
            ("2h", 7_200_000),
            ("1h30m", 5_400_000),
            ("2d", 172_800_000),
            ("1d1h1m1s1ms", 90_061_001),
            ("0s", 0),
        ] {
            assert_eq!(parse(text), Ok(Duration::from_millis(milliseconds)), "{text}");
            assert_eq!(format(Duration::from_millis(milliseconds)), text);
        }
        assert_eq!(parse("90s"), parse("1m30s"));
        for exact in [Duration::MAX, Duration::from_nanos(1), Duration::new(86_399, 999_999_999)] {
            assert_eq!(parse(&format(exact)), Ok(exact));
        }
    }

    #[test]
    fn an_invalid_duration_is_rejected_with_the_remedy() {
        for (text, part) in [
            ("30", "`30` has no unit; write `30s`"),
            ("", "`` is not a duration"),
            ("s", "such as `1h30m`"),
            ("-5s", "`-5s` is not a duration"),
            ("1.5h", "write integers"),
            ("30m1h", "the largest first"),
            ("1s1s", "is not a duration"),
            ("1h30", "is not a duration"),
            ("5 s", "is not a duration"),
            ("5w", "is not a duration"),
            ("٣s", "is not a duration"),
            ("99999999999999999999s", "too long"),
            ("18446744073709551615d", "too long"),
        ] {
            let error = parse(text).unwrap_err().to_string();
            assert!(error.contains(part), "{text}: {error}");
        }
    }

    #[derive(Debug, PartialEq, Serialize, Deserialize)]
    struct Holder {
        #[serde(with = "text")]
        every: Duration,
        #[serde(default, with = "optional_text")]
        limit: Option<Duration>,
    }

    #[test]
    fn serialized_durations_are_texts() {
        let holder = Holder { every: Duration::from_secs(90), limit: Some(Duration::from_millis(5)) };
        assert_eq!(serde_json::to_string(&holder).unwrap(), r#"{"every":"1m30s","limit":"5ms"}"#);
        let none = Holder { every: Duration::from_secs(1), limit: None };
        for holder in [holder, none] {
            let bytes = rmp_serde::to_vec_named(&holder).unwrap();
            assert_eq!(rmp_serde::from_slice::<Holder>(&bytes).unwrap(), holder);
        }
        assert_eq!(toml::from_str::<Holder>("every = '1s'").unwrap().limit, None);
    }

    #[test]
    fn a_number_without_a_unit_is_rejected_with_the_remedy() {
        let error = toml::from_str::<Holder>("every = 30").unwrap_err().to_string();
        assert!(error.contains("write `30s`"), "{error}");
        assert!(serde_json::from_str::<Holder>(r#"{"every": -1}"#).is_err());
        assert!(serde_json::from_str::<Holder>(r#"{"every": 1.5}"#).is_err());
    }
}
