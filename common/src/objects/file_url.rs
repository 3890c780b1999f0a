//! `file://` URLs (RFC 8089), in which the bytes of a path are percent-encoded.

use std::ffi::OsString;
use std::fmt::Write as _;
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::path::{Path, PathBuf};

/// The URL of an absolute path.
pub(super) fn of_path(path: &Path) -> String {
    let mut url = String::from("file://");
    for byte in path.as_os_str().as_bytes() {
        if byte.is_ascii_alphanumeric() || b"/-._~".contains(byte) {
            url.push(char::from(*byte));
        } else {
            let _ = write!(url, "%{byte:02X}");
        }
    }
    url
}

/// Decodes the path of a URL, given without `file://`; `None` if a `%` is not followed by two hexadecimal digits.
pub(super) fn to_path(encoded: &str) -> Option<PathBuf> {
    let mut bytes = Vec::with_capacity(encoded.len());
    let mut rest = encoded.bytes();
    while let Some(byte) = rest.next() {
        if byte == b'%' {
            let digits = [rest.next()?, rest.next()?];
            // The number parser would also accept a sign.
            if !digits.iter().all(u8::is_ascii_hexdigit) {
                return None;
            }
            bytes.push(u8::from_str_radix(std::str::from_utf8(&digits).ok()?, 16).ok()?);
        } else {
            bytes.push(byte);
        }
    }
    Some(PathBuf::from(OsString::from_vec(bytes)))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_path_round_trips_through_its_url() {
        for path in ["/a b", "/a%20b", "/a?b#c", "/ä/\u{1}", "/plain-1.2_3~"] {
            let url = of_path(Path::new(path));
            assert!(url.is_ascii() && !url.contains([' ', '?', '#']), "{url}");
            assert_eq!(to_path(url.strip_prefix("file://").unwrap()).unwrap(), Path::new(path));
        }
        assert_eq!(of_path(Path::new("/a%20b")), "file:///a%2520b");
        assert_eq!(to_path("/a%2"), None);
        assert_eq!(to_path("/a%+1"), None);
    }
}
