//! The SHA-256 of files: it verifies them, and names them in the object store.

use std::fmt;
use std::io::Read;
use std::path::Path;
use std::str::FromStr;

use serde::{Deserialize, Deserializer, Serialize, Serializer};
use sha2::{Digest as _, Sha256};

/// Bytes that are hashed at once.
const PIECE_LEN: usize = 256 * 1024;

/// The SHA-256 of some bytes; written as 64 lower-case hexadecimal digits.
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Digest([u8; 32]);

/// The text is not 64 lower-case hexadecimal digits.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("not a SHA-256 of 64 lower-case hexadecimal digits")]
pub struct NotADigest;

/// Hashes bytes piece by piece.
#[derive(Clone, Default)]
pub struct Hasher(Sha256);

impl Digest {
    /// The digest of these bytes.
    pub fn of(bytes: &[u8]) -> Self {
        let mut hasher = Hasher::default();
        hasher.update(bytes);
        hasher.finish()
    }

    /// The 32 bytes of the digest.
    pub fn bytes(&self) -> &[u8; 32] {
        &self.0
    }

    /// The digest and the length of a file. Blocks.
    ///
    /// # Errors
    /// If the file cannot be read.
    pub fn of_file(path: &Path) -> std::io::Result<(Self, u64)> {
        let mut hasher = Hasher::default();
        let total_bytes = hasher.read(std::fs::File::open(path)?)?;
        Ok((hasher.finish(), total_bytes))
    }
}

impl Hasher {
    /// Hashes the next piece.
    pub fn update(&mut self, piece: &[u8]) {
        self.0.update(piece);
    }

    /// Hashes a reader to its end, and returns the number of bytes. Blocks.
    ///
    /// # Errors
    /// Those of the reader.
    pub fn read(&mut self, mut reader: impl Read) -> std::io::Result<u64> {
        let mut piece = vec![0; PIECE_LEN];
        let mut total_bytes = 0;
        loop {
            let len = reader.read(&mut piece)?;
            if len == 0 {
                return Ok(total_bytes);
            }
            self.update(&piece[..len]);
            total_bytes += len as u64;
        }
    }

    /// The digest of all pieces.
    pub fn finish(self) -> Digest {
        Digest(self.0.finalize().into())
    }
}

impl fmt::Display for Digest {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.iter().try_for_each(|byte| write!(f, "{byte:02x}"))
    }
}

impl fmt::Debug for Digest {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{self}")
    }
}

impl FromStr for Digest {
    type Err = NotADigest;

    fn from_str(text: &str) -> Result<Self, NotADigest> {
        let is_hex = text.len() == 64 && text.bytes().all(|byte| matches!(byte, b'0'..=b'9' | b'a'..=b'f'));
        if !is_hex {
            return Err(NotADigest);
        }
        let mut bytes = [0; 32];
        for (idx, byte) in bytes.iter_mut().enumerate() {
            *byte = u8::from_str_radix(&text[2 * idx..2 * idx + 2], 16).map_err(|_| NotADigest)?;
        }
        Ok(Self(bytes))
    }
}

impl Serialize for Digest {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

impl<'de> Deserialize<'de> for Digest {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        String::deserialize(deserializer)?.parse().map_err(serde::de::Error::custom)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn digests_equal_those_of_sha256sum_and_round_trip_through_text() {
        let digest = Digest::of(b"abc");
        assert_eq!(digest.to_string(), "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad");
        assert_eq!(digest.to_string().parse(), Ok(digest));
        for wrong in ["", "ba78", &digest.to_string().to_uppercase(), &format!("{digest}0")] {
            assert_eq!(wrong.parse::<Digest>(), Err(NotADigest));
        }
    }

    #[test]
    fn a_file_has_the_digest_of_its_bytes() {
        let dir = tempfile::tempdir().unwrap();
        let bytes = vec![7; 3 * PIECE_LEN + 5];
        std::fs::write(dir.path().join("file"), &bytes).unwrap();
        assert_eq!(Digest::of_file(&dir.path().join("file")).unwrap(), (Digest::of(&bytes), bytes.len() as u64));
    }
}
