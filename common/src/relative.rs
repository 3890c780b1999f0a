//! Relative paths as documents and manifests write them: which stay within their folder.

/// Longest path in bytes: that of Linux, less what a sandbox's own path may take.
const BYTES_MAX: usize = 2048;

/// Longest part of a path in bytes, as most file systems have it, less what a temporary name adds.
const PART_BYTES_MAX: usize = 240;

/// Why a path is none that stays within its folder.
///
/// # Errors
/// What is wrong with it, to be put behind its name; a trailing `/` is an empty part.
pub fn check(path: &str) -> Result<(), &'static str> {
    if path.is_empty() {
        return Err("is empty");
    }
    if path.contains('\0') {
        return Err("contains a NUL byte");
    }
    if path.starts_with('/') {
        return Err("is absolute; write it relative to its folder");
    }
    if path.len() > BYTES_MAX {
        return Err("is longer than 2048 bytes");
    }
    for part in path.split('/') {
        match part {
            "" => return Err("has an empty part (`//`, or `/` at its end)"),
            "." => return Err("has a part `.`; leave it out"),
            ".." => return Err("leaves its folder by `..`"),
            long if long.len() > PART_BYTES_MAX => return Err("has a part of more than 240 bytes"),
            _ => {}
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_leaves_its_folder_is_refused() {
        for path in ["a", "a/b", "a b/ü", "..a/b..", "...", ".hidden", "-rf", "*", "a:b"] {
            assert_eq!(check(path), Ok(()), "{path}");
        }
        for path in ["", "/", "/etc", "a//b", "a/", "/a/", ".", "./a", "a/.", "..", "../a", "a/../b", "a/..", "a\0b"] {
            assert!(check(path).is_err(), "{path:?}");
        }
        assert!(check(&"a".repeat(241)).is_err());
        assert!(check(&"a/".repeat(1200)).is_err());
    }
}
