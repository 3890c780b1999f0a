//! Files that go to a site: one stream each, behind what has come before. It is written at its place and not appended, so
//! that what a connection that was given up still brings are the same bytes once more.
//!
//! A stream takes half the time of SFTP's requests and their answers, and `cat` says in the system's own words when a disk
//! or a quota is full. What was cut is a shorter file, and never gets its name: `cat` ends well then, too.
//!
//! The file is hashed there while it grows, from what stands there and not from the stream. Without Python there, it is
//! hashed when it is whole.

use std::path::Path;
use std::pin::Pin;
use std::task::{Context, Poll};

use baton_common::digest::Digest;
use tokio::fs::File;
use tokio::io::{AsyncRead, AsyncReadExt, AsyncSeekExt, ReadBuf, Take};

use super::{DIGEST, Error, SILENCE_LIMIT, Session, digest_of, quote, quote_path};

/// Bytes that are read at once.
const PIECE: usize = 1 << 20;

/// The exit for a file that has not come whole.
const CUT: i32 = 45;

/// The exit of [`FOLLOW`] that has printed a digest: some other program of that name may say that it has ended well.
const FOLLOWED: i32 = 46;

/// Hashes its standard input, which its parent appends to for as long as that has its first name. It ends with its parent,
/// or at once if another program stands between them. A pipe between two programs that do this would take as long as the
/// hashing.
const FOLLOW: &str = "
import hashlib, os, sys, time
digest, buffer, is_whole = hashlib.sha256(), bytearray(1 << 18), False
with os.fdopen(0, 'rb', 0) as file:
    while os.getppid() == int(sys.argv[2]):
        count = file.readinto(buffer)
        if count:
            digest.update(memoryview(buffer)[:count])
        elif is_whole:
            print(digest.hexdigest())
            sys.exit(int(sys.argv[3]))
        elif os.path.exists(sys.argv[1]):
            time.sleep(0.02)
        else:
            is_whole = True
";

/// Writes one file there, and gives its SHA-256 there. See [`Session::put`].
pub(super) async fn put(
    session: &Session,
    from: &Path,
    to: &str,
    progress: &(dyn Fn(u64) + Send + Sync),
) -> Result<Digest, Error> {
    let of_source = |error: std::io::Error| Error::local_file(from, &error);
    let mut source = File::open(from).await.map_err(of_source)?;
    let size = source.metadata().await.map_err(of_source)?.len();
    let (part, target) = (quote_path(&format!("{to}.part")), quote_path(to));
    let look = format!("[ ! -e {part} ] || wc -c < {part}");
    let said = session.exec(&look, b"", SILENCE_LIMIT).await?.ok()?;
    let there = String::from_utf8_lossy(&said).trim().parse().unwrap_or(0);
    let (done, make) = if there > size { (0, format!(": > {part};")) } else { (there, String::new()) };
    source.seek(std::io::SeekFrom::Start(done)).await.map_err(of_source)?;
    source.set_max_buf_size(PIECE);
    progress(done);
    let input = Counted { source: source.take(size - done), size, progress };
    let follow = quote(FOLLOW);
    let command = format!(
        "{make} {{ :; }} 1<> {part} || exit 1
         python3 -I -S -c {follow} {part} $$ {FOLLOWED} < {part} 2> /dev/null &
         {{ dd bs=1 count=0 seek={done} conv=notrunc 2> /dev/null; cat; }} 1<> {part} || exit 1
         [ \"$(wc -c < {part})\" -eq {size} ] || exit {CUT}
         mv -fT {part} {target} || exit 1
         wait $!; [ $? -eq {FOLLOWED} ] || {{ {DIGEST}; }} < {target}"
    );
    let output = session.send(&command, input).await?;
    match output.exit {
        Some(0) => digest_of(&output.stdout),
        Some(CUT) => Err(Error::file(to, "it has another length there; was it changed meanwhile?")),
        Some(_) | None => Err(Error::file(
            format!("{to}.part"),
            output.reason().unwrap_or_else(|| "it could not be written".to_owned()),
        )),
    }
}

/// A file that tells how much of it has been read.
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
