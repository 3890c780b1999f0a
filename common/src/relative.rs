//! Relative paths in documents and manifests, which must not lead out of their folder.

use std::ffi::OsStr;
use std::fmt;
use std::os::unix::ffi::OsStrExt;

/// Longest path in bytes: the limit of Linux, less the longest path of a sandbox.
const BYTES_MAX: usize = 3840;

/// Longest component of a path in bytes, as in most file systems.
const COMPONENT_BYTES_MAX: usize = 255;

/// Checks that a path is relative and does not lead out of its folder.
///
/// # Errors
/// The problem, to be put after the path. A trailing `/` is an empty component.
pub fn check(path: impl AsRef<[u8]>) -> Result<(), &'static str> {
    let path = path.as_ref();
    if path.is_empty() {
        return Err("is empty");
    }
    if path.contains(&0) {
        return Err("contains a NUL byte");
    }
    if path.starts_with(b"/") {
        return Err("is absolute; make it relative to its folder");
    }
    if path.len() > BYTES_MAX {
        return Err("is longer than 3840 bytes");
    }
    for component in path.split(|byte| *byte == b'/') {
        match component {
            b"" => return Err("has an empty component (`//` or a trailing `/`)"),
            b"." => return Err("has a component `.`; remove it"),
            b".." => return Err("leads out of its folder with `..`"),
            long if long.len() > COMPONENT_BYTES_MAX => return Err("has a component of more than 255 bytes"),
            _ => {}
        }
    }
    Ok(())
}

/// A relative path as bytes, which need not be UTF-8. Paths are ordered by their bytes.
///
/// `Display` escapes bytes that are not UTF-8 (`\xff`) and control characters (`\n`).
#[derive(Clone, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct BytePath(Vec<u8>);

impl BytePath {
    /// The bytes of the path.
    pub fn as_bytes(&self) -> &[u8] {
        &self.0
    }

    /// The path as text; `None` if it is not UTF-8.
    pub fn as_str(&self) -> Option<&str> {
        std::str::from_utf8(&self.0).ok()
    }

    /// The path for the file system.
    pub fn as_path(&self) -> &std::path::Path {
        std::path::Path::new(OsStr::from_bytes(&self.0))
    }

    /// The bytes in hexadecimal digits.
    pub fn to_hex(&self) -> String {
        self.0.iter().map(|byte| format!("{byte:02x}")).collect()
    }

    /// The path with these bytes in hexadecimal digits; `None` if the text has anything else.
    pub fn from_hex(hex: &str) -> Option<Self> {
        let digit = |byte: u8| char::from(byte).to_digit(16).and_then(|digit| u8::try_from(digit).ok());
        let pairs = hex.as_bytes().chunks(2);
        let bytes = pairs.map(|pair| match pair {
            [high, low] => Some(digit(*high)? << 4 | digit(*low)?),
            _ => None,
        });
        bytes.collect::<Option<_>>().map(Self)
    }
}

impl From<&str> for BytePath {
    fn from(path: &str) -> Self {
        Self(path.as_bytes().to_vec())
    }
}

impl From<String> for BytePath {
    fn from(path: String) -> Self {
        Self(path.into_bytes())
    }
}

impl From<Vec<u8>> for BytePath {
    fn from(path: Vec<u8>) -> Self {
        Self(path)
    }
}

impl AsRef<[u8]> for BytePath {
    fn as_ref(&self) -> &[u8] {
        &self.0
    }
}

impl fmt::Display for BytePath {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for chunk in self.0.utf8_chunks() {
            for letter in chunk.valid().chars() {
                if letter.is_control() { write!(f, "{}", letter.escape_default())? } else { write!(f, "{letter}")? }
            }
            chunk.invalid().iter().try_for_each(|byte| write!(f, "\\x{byte:02x}"))?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_path_that_leads_out_of_its_folder_is_rejected() {
        for path in ["a", "a/b", "a b/ü", "..a/b..", "...", ".hidden", "-rf", "*", "a:b", "a\nb", "\\"] {
            assert_eq!(check(path), Ok(()), "{path}");
        }
        assert_eq!(check(b"\xff/\xfe"), Ok(()));
        for path in ["", "/", "/etc", "a//b", "a/", "/a/", ".", "./a", "a/.", "..", "../a", "a/../b", "a/..", "a\0b"] {
            assert!(check(path).is_err(), "{path:?}");
        }
        assert_eq!(check("a".repeat(255)), Ok(()));
        assert!(check("a".repeat(256)).is_err());
        assert!(check("a/".repeat(1950)).is_err());
    }

    #[test]
    fn a_path_keeps_its_bytes_and_is_displayed_with_escapes() {
        let path = BytePath::from(b"caf\xe9\n/\xc3\xbc".to_vec());
        assert_eq!(path.to_string(), "caf\\xe9\\n/ü");
        assert_eq!((path.as_str(), BytePath::from_hex(&path.to_hex()).as_ref()), (None, Some(&path)));
        assert_eq!((BytePath::from_hex("e"), BytePath::from_hex("zz")), (None, None));
    }
}
