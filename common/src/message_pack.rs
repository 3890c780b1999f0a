//! Reads MessagePack from untrusted senders.

use serde::Deserialize;

/// Deepest nesting that is read. Each level is a recursive call of the reader, and a thread has 2 MiB of stack. The
/// JSON reader accepts 128 levels; a value from there is wrapped in a few more before it is written here.
const DEPTH_MAX: usize = 256;

/// Reads a value from the beginning of the bytes.
///
/// # Errors
/// The bytes are not such a value, or are nested too deeply.
pub(crate) fn read<'a, T: Deserialize<'a>>(bytes: &'a [u8]) -> Result<T, rmp_serde::decode::Error> {
    let mut reader = rmp_serde::Deserializer::from_read_ref(bytes);
    reader.set_max_depth(DEPTH_MAX);
    T::deserialize(&mut reader)
}
