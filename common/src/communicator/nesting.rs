//! Determines how deeply the headers of a message are nested, without recursion.
//!
//! The library's parser of headers recurses for each nested list. A frame of 128 KiB can have some 26,000 of them,
//! which overflow the stack of a thread.

/// Deepest nesting that is accepted. RabbitMQ's own headers have three levels.
const DEPTH_MAX: usize = 64;

/// The flags of the properties up to the headers.
const CONTENT_TYPE: u16 = 0x8000;
const CONTENT_ENCODING: u16 = 0x4000;
const HEADERS: u16 = 0x2000;

/// An open table or list.
struct Open {
    end: usize,
    has_keys: bool,
}

/// Whether the headers among the properties of a message are nested too deeply to be parsed. False for malformed
/// properties, which the parser rejects at the same position.
pub(super) fn is_too_deep(properties: &[u8]) -> bool {
    find(properties) == Some(true)
}

/// Returns `None` for truncated or malformed properties.
fn find(properties: &[u8]) -> Option<bool> {
    let mut reader = Reader { bytes: properties, at: 0 };
    let flags = u16::from_be_bytes(reader.take()?);
    for flag in [CONTENT_TYPE, CONTENT_ENCODING] {
        if flags & flag != 0 {
            reader.skip_short()?;
        }
    }
    if flags & HEADERS == 0 {
        return Some(false);
    }
    let mut open = vec![Open { end: reader.end_of_long()?, has_keys: true }];
    while let Some(Open { end, has_keys }) = open.last() {
        if reader.at >= *end {
            open.pop();
            continue;
        }
        if *has_keys {
            reader.skip_short()?;
        }
        let [kind] = reader.take()?;
        match kind {
            b'V' => {}
            b't' | b'b' | b'B' => reader.skip(1)?,
            b'U' | b'u' => reader.skip(2)?,
            b'I' | b'i' | b'f' => reader.skip(4)?,
            b'D' => reader.skip(5)?,
            b'L' | b'l' | b'd' | b'T' => reader.skip(8)?,
            b's' => reader.skip_short()?,
            b'S' | b'x' => reader.at = reader.end_of_long()?,
            b'A' | b'F' => {
                if open.len() == DEPTH_MAX {
                    return Some(true);
                }
                open.push(Open { end: reader.end_of_long()?, has_keys: kind == b'F' });
            }
            _ => return None,
        }
    }
    Some(false)
}

struct Reader<'a> {
    bytes: &'a [u8],
    at: usize,
}

impl Reader<'_> {
    fn take<const N: usize>(&mut self) -> Option<[u8; N]> {
        let (head, _) = self.bytes.get(self.at..)?.split_first_chunk()?;
        self.at += N;
        Some(*head)
    }

    fn skip(&mut self, n_bytes: usize) -> Option<()> {
        self.at = self.at.checked_add(n_bytes).filter(|at| *at <= self.bytes.len())?;
        Some(())
    }

    fn skip_short(&mut self) -> Option<()> {
        let [n_bytes] = self.take()?;
        self.skip(n_bytes.into())
    }

    /// Reads a length, and returns the end of the item that follows.
    fn end_of_long(&mut self) -> Option<usize> {
        let n_bytes = u32::from_be_bytes(self.take()?) as usize;
        self.at.checked_add(n_bytes).filter(|end| *end <= self.bytes.len())
    }
}

#[cfg(test)]
mod tests {
    use lapin::protocol::basic::parse_properties;

    use super::*;

    fn nested(opening: u8, depth: usize) -> Vec<u8> {
        let mut value = vec![b'V'];
        for _ in 0..depth {
            let key: &[u8] = if opening == b'F' { &[1, b'k'] } else { &[] };
            let content = [key, &value].concat();
            value = [&[opening][..], &u32::try_from(content.len()).unwrap().to_be_bytes(), &content].concat();
        }
        let table = [&[1, b'x'][..], &value].concat();
        [&HEADERS.to_be_bytes()[..], &u32::try_from(table.len()).unwrap().to_be_bytes(), &table].concat()
    }

    #[test]
    fn headers_are_too_deep_only_beyond_the_limit() {
        for opening in [b'A', b'F'] {
            // The header table is a level itself.
            let deepest = nested(opening, DEPTH_MAX - 1);
            assert!(!is_too_deep(&deepest) && parse_properties(&deepest[..]).is_ok());
            assert!(is_too_deep(&nested(opening, DEPTH_MAX)));
            assert!(is_too_deep(&nested(opening, 10_000)));
        }
    }

    #[test]
    fn absent_and_truncated_headers_are_not_too_deep() {
        let deep = nested(b'A', 10_000);
        assert!(!is_too_deep(&[]) && !is_too_deep(&[0, 0]) && !is_too_deep(&deep[..deep.len() / 2]));
        assert!(parse_properties(&deep[..deep.len() / 2]).is_err());
    }
}
