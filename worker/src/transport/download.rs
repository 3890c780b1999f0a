//! Downloads from a site: one stream for each file, which resumes an interrupted transfer. A stream takes half the time
//! of SFTP's requests and answers.
//!
//! The program that sends a large file also hashes it, whenever the connection takes no data. Without Python at the site,
//! one program hashes the file while another sends it.

use std::convert::Infallible;
use std::path::Path;

use baton_common::digest::Digest;
use tokio::sync::{mpsc, watch};

use super::part_file::PartFile;
use super::{
    DIGEST, DIGEST_LIMIT, Error, HASHED_ON_THE_WAY_FROM, Output, SILENCE_LIMIT, Session, digest_of, quote, quote_path,
};

/// The exit for a file that was sent but cannot be hashed.
const UNREAD: i32 = 47;

/// The exit of [`SEND`] after everything was sent and hashed. Exit 0 may come from another program named `python3`.
const SENT: i32 = 46;

/// The exit of [`SEND`] after an incomplete transfer.
const CUT: i32 = 45;

/// Sends its standard input, from a position up to a length, to descriptor 3, and prints the SHA-256 of the whole file to
/// descriptor 4 as soon as it is known. It sends without copying and hashes while the pipe is full. After hashing it
/// waits a little when the pipe becomes writable, so that more than one page is free: a reader at 400 MB/s takes 200 KB
/// of the 1 MB in the pipe meanwhile. Wrappers of this process may write to its standard outputs.
const SEND: &str = "
import fcntl, hashlib, os, select, sys, time
begin, size, all_sent, cut = map(int, sys.argv[1:])
data, said, set_pipe_size = 3, 4, 1031
position, digest, hashed, is_sent, is_hashed = begin, hashlib.sha256(), 0, False, False
try:
    try:
        fcntl.fcntl(data, set_pipe_size, 1 << 20)
    except OSError:
        pass
    os.set_blocking(data, False)
    ready = select.poll()
    ready.register(data, select.POLLOUT)
    while not (is_sent and is_hashed):
        if not is_hashed:
            piece = os.pread(0, 1 << 19, hashed)
            digest.update(piece)
            hashed += len(piece)
            if not piece:
                is_hashed = True
                os.write(said, ('\\n' + digest.hexdigest() + '\\n').encode())
        if not is_sent:
            try:
                count = os.sendfile(data, 0, position, min(1 << 20, size - position)) if position < size else 0
                position += count
                is_sent = count == 0
            except BlockingIOError:
                if is_hashed:
                    ready.poll()
                    time.sleep(0.0005)
except BaseException as error:
    os.set_blocking(data, True)
    if position == begin:
        sys.exit(1)
    try:
        os.write(said, ('\\npython3: ' + str(error) + '\\n').encode())
    finally:
        os._exit(cut)
sys.exit(all_sent)
";

/// See [`Session::size`].
pub(super) async fn size(session: &Session, path: &str) -> Result<u64, Error> {
    let said = session.exec(&format!("wc -c < {}", quote_path(path)), b"", SILENCE_LIMIT).await?;
    ended_well(&said, path)?;
    String::from_utf8_lossy(&said.stdout).trim().parse().map_err(|_| Error::file(path, "its size is unknown"))
}

/// Fetches one file, which may change meanwhile; the caller compares the SHA-256. See [`Session::get`].
pub(super) async fn get(
    session: &Session,
    from: &str,
    to: &Path,
    progress: &(dyn Fn(u64) + Send + Sync),
) -> Result<Digest, Error> {
    let (mut target, _here) = PartFile::open(to, size(session, from).await?).await?;
    let told = target.told();
    let coming = async {
        if !target.is_whole() {
            let command = format!("{} < {}", send_from(target.done), quote_path(from));
            let (read, back) = session.receive_within(|_| SILENCE_LIMIT, &command, target, |_| ()).await;
            target = came(back, read, from).await?;
        }
        target.finish(to).await
    };
    telling(progress, told, coming).await
}

/// Fetches one file unless its digest is known. See [`Session::get_unless`].
pub(super) async fn get_unless<E: From<Error>>(
    session: &Session,
    from: &str,
    size: u64,
    to: &Path,
    progress: &(dyn Fn(u64) + Send + Sync),
    is_known: impl AsyncFnOnce(Digest) -> Result<bool, E>,
) -> Result<(Digest, Option<Digest>), E> {
    enum Stop<E> {
        Known(Digest),
        Failed(E),
    }
    let (mut target, _here) = PartFile::open(to, size).await?;
    let told = target.told();
    if target.is_whole() {
        progress(target.done);
        let there = session.digest(from).await?;
        let came = if is_known(there).await? { None } else { Some(target.finish(to).await?) };
        return Ok((there, came));
    }
    let (digest_tx, mut digest_rx) = mpsc::channel(1);
    let begin = target.done;
    let coming = async {
        let mut read = Ok(Output::default());
        for command in
            [hash_and_send_at_once(from, begin, size), Some(hash_and_send(from, begin))].into_iter().flatten()
        {
            let told = told.clone();
            // After the last byte the site may still have to hash.
            let limit = move |_| if *told.borrow() < size { SILENCE_LIMIT } else { DIGEST_LIMIT };
            let digest_tx = digest_tx.clone();
            // Only the first digest counts.
            let show = move |stderr: &[u8]| {
                if let Some(digest) = digest_in(stderr) {
                    let _ = digest_tx.try_send(digest);
                }
            };
            (read, target) = session.receive_within(limit, &command, target, show).await;
            // A command that was killed before it sent anything was not started properly; try the next.
            if target.done > begin || !matches!(&read, Ok(output) if is_killed(output)) {
                break;
            }
        }
        drop(digest_tx);
        came(target, read, from).await.map_err(|error| Stop::Failed(error.into()))
    };
    let asking = async {
        let Some(digest) = digest_rx.recv().await else { return Ok(None) };
        match is_known(digest).await {
            Ok(true) => Err(Stop::Known(digest)),
            Ok(false) => Ok(Some(digest)),
            Err(error) => Err(Stop::Failed(error)),
        }
    };
    match Box::pin(telling(progress, told.clone(), async { tokio::try_join!(coming, asking) })).await {
        Ok((target, digest)) => {
            // The file has grown, or the connection broke after the last byte.
            let there = match digest {
                Some(there) => there,
                None => session.digest(from).await?,
            };
            Ok((there, Some(target.finish(to).await?)))
        }
        Err(Stop::Known(digest)) => Ok((digest, None)),
        Err(Stop::Failed(error)) => Err(error),
    }
}

/// Reports the progress of a transfer while it runs.
async fn telling<T>(
    progress: &(dyn Fn(u64) + Send + Sync),
    mut told: watch::Receiver<u64>,
    coming: impl Future<Output = T>,
) -> T {
    let telling = async {
        loop {
            progress(*told.borrow_and_update());
            if told.changed().await.is_err() {
                return std::future::pending::<Infallible>().await;
            }
        }
    };
    tokio::select! {
        biased;
        never = telling => match never {},
        came = coming => came,
    }
}

/// Gives the target back if what should come has come.
async fn came(target: PartFile, read: Result<Output, Error>, from: &str) -> Result<PartFile, Error> {
    match read {
        Ok(output) => ended_well(&output, from).map(|()| target),
        // Data beyond the expected size is not part of the file.
        Err(_) if target.is_whole() => Ok(target),
        Err(error) => Err(target.fault().await.unwrap_or(error)),
    }
}

/// Sends standard input from a position on.
fn send_from(position: u64) -> String {
    format!("{{ dd bs=1 count=0 skip={position} 2> /dev/null; cat; }}")
}

/// A command that sends a file, and prints its digest on standard error.
fn hash_and_send(from: &str, position: u64) -> String {
    let (source, send) = (quote_path(from), send_from(position));
    format!(
        "exec 3>&1 4>&2
         {{ echo; {DIGEST}; }} < {source} >&4 &
         {send} < {source} || {{ kill $!; exit 1; }}
         wait $! || exit {UNREAD}"
    )
}

/// The same for a large file, by [`SEND`] if the site has Python.
fn hash_and_send_at_once(from: &str, position: u64, size: u64) -> Option<String> {
    if size < HASHED_ON_THE_WAY_FROM {
        return None;
    }
    let (source, program, otherwise) = (quote_path(from), quote(SEND), hash_and_send(from, position));
    Some(format!(
        "exec 3>&1 4>&2
         python3 -I -S -c {program} {position} {size} {SENT} {CUT} < {source} > /dev/null 2>&1
         code=$?
         [ $code -ne {SENT} ] || exit 0
         [ $code -ne {CUT} ] && [ $code -lt 128 ] || exit $code
         {otherwise}"
    ))
}

/// Finds the digest in the output of such a command so far.
fn digest_in(printed: &[u8]) -> Option<Digest> {
    let n_whole = printed.iter().rposition(|byte| *byte == b'\n')?;
    printed[..n_whole].split(|byte| *byte == b'\n').find_map(|line| digest_of(line).ok())
}

fn ended_well(output: &Output, from: &str) -> Result<(), Error> {
    match output.exit {
        Some(0) => Ok(()),
        // A killed command says nothing about the file.
        _ if is_killed(output) => Err(Error::Broken("the command that reads the file was killed".to_owned())),
        None | Some(_) => Err(Error::file(from, output.reason().unwrap_or_else(|| "it could not be read".to_owned()))),
    }
}

fn is_killed(output: &Output) -> bool {
    matches!(output.exit, None | Some(128..))
}
