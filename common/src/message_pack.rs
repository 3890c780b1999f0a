//! Reads MessagePack that strangers may have written.

use serde::Deserialize;

/// Deepest nesting that is read. Each level is a call of the reader by itself, and a thread has 2 MiB of stack. The reader of
/// JSON takes 128; what was read there is wrapped a few times before it is written here.
const DEPTH_MAX: usize = 256;

/// Reads a value from the beginning of these bytes.
///
/// # Errors
/// The bytes are something else, or are nested too deeply.
pub(crate) fn read<'a, T: Deserialize<'a>>(bytes: &'a [u8]) -> Result<T, rmp_serde::decode::Error> {
    let mut reader = rmp_serde::Deserializer::from_read_ref(bytes);
    reader.set_max_depth(DEPTH_MAX);
    T::deserialize(&mut reader)
}
