//! The file with the values of a process.

use serde_json::{Map, Value};

/// The greatest size of the file, in bytes.
pub(super) const BYTES_MAX: usize = 64 * 1024;

/// Numbers that some programs write and that JSON does not have.
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
        Ok(Value::Object(values)) => Ok(values),
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

/// Finds the word of [`NO_NUMBERS`] at a column of a line, counted from 1.
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
        assert!(read(b"{\"a\": \"\xff\"}").is_err());
        assert!(read(format!("{{\"a\": \"{}\"}}", "x".repeat(BYTES_MAX)).as_bytes()).is_err());
        assert_eq!(read("\u{feff}{\"a\": null}".as_bytes()).unwrap_or_default().len(), 1);
    }
}
