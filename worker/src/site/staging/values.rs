//! The file with the values of a process.

use serde_json::{Map, Value};

/// The greatest size of the file, in bytes.
pub(super) const BYTES_MAX: usize = 64 * 1024;

/// Digits of a large integer that an error shows.
const INTEGER_SHOWN_MAX: usize = 40;

/// Numbers as some programs write them, which JSON does not have.
const NO_NUMBERS: [&str; 7] = ["NaN", "nan", "Infinity", "-Infinity", "inf", "-inf", "Inf"];

/// Parses the file.
///
/// # Errors
/// The problem and the remedy, as the rest of a sentence that starts with the name of the file.
pub(super) fn read(bytes: &[u8]) -> Result<Map<String, Value>, String> {
    if bytes.len() > BYTES_MAX {
        return Err(format!("has more than {} KiB; name it in `out` instead", BYTES_MAX / 1024));
    }
    let bytes = bytes.strip_prefix("\u{feff}".as_bytes()).unwrap_or(bytes);
    match serde_json::from_slice(bytes) {
        Ok(Value::Object(values)) => match too_large_integer(bytes) {
            Some((integer, line)) => {
                let shown: String = integer.chars().take(INTEGER_SHOWN_MAX).collect();
                Err(format!(
                    "has the integer {shown} in line {line}, which does not fit in 64 bits; write it as a string"
                ))
            }
            None => Ok(values),
        },
        Ok(_) => Err("is JSON, but not an object; write {\"NAME\": VALUE}".to_owned()),
        Err(error) => {
            let line = bytes.split(|byte| *byte == b'\n').nth(error.line().saturating_sub(1)).unwrap_or_default();
            match no_number(line, error.column()) {
                Some(token) => Err(format!(
                    "has `{token}` in line {}, which JSON does not have; write null or a text",
                    error.line()
                )),
                None => Err(format!("is not a JSON object: {error}")),
            }
        }
    }
}

/// The first integer in a valid JSON text that does not fit in 64 bits, with its line. `serde_json` reads such an
/// integer as a float and loses digits.
fn too_large_integer(json: &[u8]) -> Option<(&str, usize)> {
    let is_of_number = |byte: &u8| byte.is_ascii_digit() || b"-+.eE".contains(byte);
    let (mut at, mut line) = (0, 1);
    while at < json.len() {
        match json[at] {
            b'"' => {
                at += 1;
                // In valid JSON a string has no line break.
                while at < json.len() && json[at] != b'"' {
                    at += if json[at] == b'\\' { 2 } else { 1 };
                }
            }
            b'\n' => line += 1,
            b'-' | b'0'..=b'9' => {
                let len = json[at..].iter().take_while(|byte| is_of_number(byte)).count();
                let number = std::str::from_utf8(&json[at..at + len]).ok()?;
                let is_integer = !number.contains(['.', 'e', 'E']);
                if is_integer && number.parse::<i64>().is_err() && number.parse::<u64>().is_err() {
                    return Some((number, line));
                }
                at += len - 1;
            }
            _ => {}
        }
        at += 1;
    }
    None
}

/// The word of [`NO_NUMBERS`] at a column of a line, counted from 1.
fn no_number(line: &[u8], column: usize) -> Option<&'static str> {
    let is_of_word = |byte: &u8| byte.is_ascii_alphanumeric() || b"-+._".contains(byte);
    let at = column.saturating_sub(1).min(line.len());
    let begin = line[..at].iter().rposition(|byte| !is_of_word(byte)).map_or(0, |before| before + 1);
    let end = line[at..].iter().position(|byte| !is_of_word(byte)).map_or(line.len(), |len| at + len);
    NO_NUMBERS.into_iter().find(|word| word.as_bytes() == &line[begin..end])
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_error_in_the_values_is_reported_with_its_line() {
        for (text, expected) in [
            ("{\"a\": NaN}", "has `NaN` in line 1,"),
            ("{\"a\": 1,\n \"b\": [1, -Infinity]}", "has `-Infinity` in line 2,"),
            ("{\"a\": Infinity\n}", "has `Infinity` in line 1,"),
            ("{\"a\": nan}", "has `nan` in line 1,"),
            ("{\"a\": -inf}", "has `-inf` in line 1,"),
            ("[1]", "is JSON, but not an object"),
            ("{\"a\": 1", "is not a JSON object: EOF while parsing an object at line 1"),
            ("{'a': 1}", "is not a JSON object: key must be a string at line 1"),
            ("", "is not a JSON object"),
        ] {
            let problem = read(text.as_bytes()).unwrap_err();
            assert!(problem.starts_with(expected), "{text}: {problem}");
        }
        for (text, integer, line) in [
            ("{\"a\": 18446744073709551616}", "18446744073709551616", 1),
            ("{\"a\\\\\": \"x\\\"1\",\n\"b\": [-1.5, -9223372036854775809]}", "-9223372036854775809", 2),
        ] {
            let problem = read(text.as_bytes()).unwrap_err();
            assert!(problem.starts_with(&format!("has the integer {integer} in line {line},")), "{text}: {problem}");
        }
        assert!(read(b"{\"a\": \"\xff\"}").is_err());
        assert!(read(format!("{{\"a\": \"{}\"}}", "x".repeat(BYTES_MAX)).as_bytes()).is_err());
        let exact = "{\"a\": [18446744073709551615, -9223372036854775808, 1e40], \"b\": \"18446744073709551616\"}";
        let values = read(exact.as_bytes()).unwrap();
        assert_eq!((&values["a"][0], &values["a"][1]), (&u64::MAX.into(), &i64::MIN.into()));
        assert_eq!(read("\u{feff}{\"a\": null}".as_bytes()).unwrap_or_default().len(), 1);
    }
}
