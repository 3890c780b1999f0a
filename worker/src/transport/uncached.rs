//! Files that are written without the page cache: they must be on the disk before they are reported as complete, and a
//! copy in memory would only cost processor time.

use std::fs::File;
use std::io::{self, Write};

use bytes::{Buf, Bytes};
use rustix::fs::{OFlags, fcntl_getfl, fcntl_setfl};

/// Alignment of memory, file positions and lengths. A file system that needs more reports an error.
const ALIGN: usize = 4096;

/// Bytes written at a time: enough to keep a disk busy.
const BLOCK_BYTES: usize = 1 << 20;

/// An aligned buffer for one write.
#[derive(Debug)]
pub(super) struct Block {
    /// The block starts at the first aligned address in it.
    memory: Vec<u8>,
    begin: usize,
    n_filled: usize,
    n_full: usize,
}

impl Block {
    /// An empty block for the data after `n_before` bytes of the file. Its end is aligned in the file.
    pub(super) fn behind(n_before: u64) -> Self {
        let memory = vec![0; BLOCK_BYTES + ALIGN];
        let begin = memory.as_ptr().align_offset(ALIGN);
        let n_over = usize::try_from(n_before % ALIGN as u64).expect("a remainder of a small number");
        Self { memory, begin, n_filled: 0, n_full: BLOCK_BYTES - n_over }
    }

    /// Takes as much of a piece as fits.
    pub(super) fn fill(&mut self, piece: &mut Bytes) {
        let count = piece.len().min(self.n_full - self.n_filled);
        let at = self.begin + self.n_filled;
        piece.copy_to_slice(&mut self.memory[at..at + count]);
        self.n_filled += count;
    }

    pub(super) fn is_full(&self) -> bool {
        self.n_filled == self.n_full
    }

    pub(super) fn bytes(&self) -> &[u8] {
        &self.memory[self.begin..self.begin + self.n_filled]
    }

    /// Empties the block, for data at an aligned position.
    pub(super) fn clear(&mut self) {
        self.n_filled = 0;
        self.n_full = BLOCK_BYTES;
    }
}

/// A file to append to.
pub(super) struct Uncached {
    file: File,
    position: u64,
    /// Whether the file system supports direct writes.
    is_possible: bool,
    is_direct: bool,
}

impl Uncached {
    /// Appends at the current position of the file, which is after `n_before` bytes.
    pub(super) fn new(file: File, n_before: u64) -> Self {
        Self { file, position: n_before, is_possible: true, is_direct: false }
    }

    /// Writes a block; the first and the last may go through the page cache.
    pub(super) fn put(&mut self, block: &Block) -> io::Result<()> {
        let mut bytes = block.bytes();
        let is_aligned = self.position.is_multiple_of(ALIGN as u64) && bytes.len().is_multiple_of(ALIGN);
        self.set_direct(is_aligned && self.is_possible)?;
        while !bytes.is_empty() {
            match self.file.write(bytes) {
                Ok(0) => return Err(io::ErrorKind::WriteZero.into()),
                Ok(count) => {
                    self.position += count as u64;
                    bytes = &bytes[count..];
                }
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                // The file system needs another alignment, or supports no direct writes.
                Err(error) if error.kind() == io::ErrorKind::InvalidInput && self.is_direct => {
                    self.is_possible = false;
                    self.set_direct(false)?;
                }
                Err(error) => return Err(error),
            }
        }
        Ok(())
    }

    fn set_direct(&mut self, is_direct: bool) -> io::Result<()> {
        if is_direct == self.is_direct {
            return Ok(());
        }
        let mut flags = fcntl_getfl(&self.file)?;
        flags.set(OFlags::DIRECT, is_direct);
        match fcntl_setfl(&self.file, flags) {
            Ok(()) => self.is_direct = is_direct,
            Err(_) if is_direct => self.is_possible = false,
            Err(error) => return Err(error.into()),
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use std::io::{Seek, SeekFrom};

    use super::*;

    #[test]
    fn data_written_in_any_pieces_is_complete() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("file");
        // In the last case the alignment is wrong, and the file system may refuse the direct write.
        for (n_before, told) in [(0, 0), (ALIGN, ALIGN), (5, 5), (ALIGN - 1, ALIGN - 1), (5, 0)] {
            let before = vec![7; n_before];
            std::fs::write(&path, &before).unwrap();
            let mut file = std::fs::OpenOptions::new().write(true).open(&path).unwrap();
            file.seek(SeekFrom::End(0)).unwrap();
            let bytes: Vec<u8> = (0..3 * BLOCK_BYTES + 5).map(|idx| (idx % 251) as u8).collect();
            let mut target = Uncached::new(file, told as u64);
            let mut block = Block::behind(told as u64);
            for piece in bytes.chunks(70_001) {
                let mut piece = Bytes::copy_from_slice(piece);
                while !piece.is_empty() {
                    block.fill(&mut piece);
                    if block.is_full() {
                        target.put(&block).unwrap();
                        assert_eq!(target.is_direct, target.is_possible && block.bytes().len() == BLOCK_BYTES);
                        block.clear();
                    }
                }
            }
            target.put(&block).unwrap();
            assert!(std::fs::read(&path).unwrap() == [before, bytes].concat(), "behind {n_before} bytes");
        }
    }
}
