//! Uploads to a site: one stream for each file, which resumes an interrupted transfer. Data is written at its position,
//! not appended, so late data of an abandoned connection only repeats the same bytes.
//!
//! A stream takes half the time of SFTP's requests and answers, and `cat` reports a full disk or quota in the system's
//! own words. An interrupted stream leaves a shorter file, which never gets its final name, although `cat` succeeds.
//!
//! The site hashes the file while it grows, from the disk, not from the stream. Without Python at the site, the file is
//! hashed when it is complete.

use std::path::Path;
use std::pin::Pin;
use std::task::{Context, Poll};

use baton_common::digest::Digest;
use tokio::fs::File;
use tokio::io::{AsyncRead, AsyncReadExt, AsyncSeekExt, ReadBuf, Take};

use super::local::part_of;
use super::{
    DIGEST, DIGEST_LIMIT, Error, HASHED_ON_THE_WAY_FROM, SILENCE_LIMIT, Session, digest_of, quote, quote_path,
};

/// Bytes read at a time.
const PIECE: usize = 1 << 20;

/// The exit for an incomplete file.
const CUT: i32 = 45;

/// The exit for a complete file that cannot be hashed.
const UNREAD: i32 = 47;

/// The exit of [`FOLLOW`] after it printed a digest. Exit 0 may come from another program named `python3`.
const FOLLOWED: i32 = 46;

/// Hashes its standard input while that file has the part's name, then the rest of it. It prints a digest only if the
/// same file is the target in the end and has the expected size. It ends with its parent, and at once if another process
/// is between them. (A pipe through a hashing program would cost as much processor time as the hashing.)
///
/// Descriptor 3 is the pipe of the upload. It is enlarged to the maximum for unprivileged users: with the default of 64
/// KiB, writer and reader wait for each other after every piece (`tests/bench/sites files` measures the effect).
const FOLLOW: &str = "
import fcntl, hashlib, os, sys, time
part, target, size, parent, followed = sys.argv[1], sys.argv[2], *map(int, sys.argv[3:])
set_pipe_size = 1031
try:
    fcntl.fcntl(3, set_pipe_size, 1 << 20)
except OSError:
    pass
os.close(3)
def is_at(path):
    try:
        return os.path.samestat(os.stat(path), os.fstat(0))
    except FileNotFoundError:
        return False
digest, buffer, total, is_whole = hashlib.sha256(), bytearray(1 << 18), 0, False
with os.fdopen(0, 'rb', 0) as file:
    while os.getppid() == parent:
        count = file.readinto(buffer)
        if count:
            digest.update(memoryview(buffer)[:count])
            total += count
        elif is_whole:
            if total == size and is_at(target):
                print(digest.hexdigest())
                sys.exit(followed)
            break
        elif is_at(part):
            time.sleep(0.02)
        else:
            is_whole = True
";

/// Writes one file to the site and returns its SHA-256 there. See [`Session::put`].
pub(super) async fn put(
    session: &Session,
    from: &Path,
    to: &str,
    progress: &(dyn Fn(u64) + Send + Sync),
) -> Result<Digest, Error> {
    let of_source = |error: std::io::Error| Error::local_file(from, &error);
    let mut source = File::open(from).await.map_err(of_source)?;
    let size = source.metadata().await.map_err(of_source)?.len();
    let part_path = part_of(Path::new(to)).display().to_string();
    let (part, target) = (quote_path(&part_path), quote_path(to));
    let look = format!("[ ! -e {part} ] || wc -c < {part}");
    let said = session.exec(&look, b"", SILENCE_LIMIT).await?.ok()?;
    let there = String::from_utf8_lossy(&said).trim().parse().unwrap_or(0);
    let (done, make) = if there > size { (0, format!(": > {part};")) } else { (there, String::new()) };
    source.seek(std::io::SeekFrom::Start(done)).await.map_err(of_source)?;
    source.set_max_buf_size(PIECE);
    progress(done);
    let input = Counted { source: source.take(size - done), size, progress };
    let (follow, unless_followed) = if size < HASHED_ON_THE_WAY_FROM {
        (String::new(), String::new())
    } else {
        let program = quote(FOLLOW);
        (
            format!(
                // In a subshell, `$$` is still the process id of the outer shell.
                "exec 3<&0
                 parent=$(exec /bin/sh -c 'echo $PPID')
                 python3 -I -S -c {program} {part} {target} {size} \"$parent\" {FOLLOWED} < {part} 2> /dev/null &
                 exec 3<&-"
            ),
            format!("wait $!; [ $? -eq {FOLLOWED} ] ||"),
        )
    };
    let command = format!(
        "{make} {{ :; }} 1<> {part} || exit 1
         {follow}
         {{ dd bs=1 count=0 seek={done} conv=notrunc 2> /dev/null; cat; }} 1<> {part} || exit 1
         [ \"$(wc -c < {part})\" -eq {size} ] || exit {CUT}
         mv -fT {part} {target} || exit 1
         {unless_followed} {{ echo; {DIGEST}; }} < {target} || exit {UNREAD}"
    );
    // After the last byte the site may have to hash the part from earlier transfers.
    let limit = |is_fed| if is_fed { DIGEST_LIMIT } else { SILENCE_LIMIT };
    let output = session.send_within(&limit, &command, input).await?;
    let reason = |otherwise: &str| output.reason().unwrap_or_else(|| otherwise.to_owned());
    match output.exit {
        Some(0) => digest_of(&output.stdout),
        Some(CUT) => Err(Error::file(to, "it has another size at the site; was it changed meanwhile?")),
        Some(UNREAD) => Err(Error::file(to, reason("it could not be read again"))),
        // A killed command says nothing about the file.
        None | Some(128..) => Err(Error::Broken("the command that writes the file was killed".to_owned())),
        Some(_) => Err(Error::file(part_path, reason("it could not be written"))),
    }
}

/// A file that reports how much of it has been read.
struct Counted<'a> {
    source: Take<File>,
    size: u64,
    progress: &'a (dyn Fn(u64) + Send + Sync),
}

impl AsyncRead for Counted<'_> {
    fn poll_read(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        buf: &mut ReadBuf<'_>,
    ) -> Poll<std::io::Result<()>> {
        let read = Pin::new(&mut self.source).poll_read(context, buf);
        (self.progress)(self.size - self.source.limit());
        read
    }
}
