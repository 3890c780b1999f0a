//! `baton logs`: prints output through the worker while the process runs, and from the database afterwards.

use std::io::Write;
use std::time::Duration;

use baton_common::exit;
use baton_common::id::Pid;
use baton_common::message::Control;
use baton_common::store::query::{Filter, Summary};
use baton_common::store::writer::{Output, Stream};
use baton_worker::transport::{Session, quote};

use super::site;
use crate::cli::{Global, LogsArguments};
use crate::client::{Client, absent, read_ids};
use crate::failure::Failure;

/// Time limit for the answer of a worker.
const HOLDER_LIMIT: Duration = Duration::from_secs(5);

/// Pause between two reads of a stream that has not grown.
const LOOK: Duration = Duration::from_millis(200);

/// Pause for a job at a site, where each read runs two commands.
const SITE_LOOK: Duration = Duration::from_secs(1);

/// Number of bytes of a stream that are fetched at once.
const PIECE_BYTES: usize = 4 << 20;

/// The kind of a process whose program runs at a site.
const JOB: &str = "job";

/// How far both streams have been printed: for one attempt of a local program, or for one try of a job at a site, which may
/// span several attempts.
#[derive(Clone, Copy, Default)]
struct Printed {
    epoch: i64,
    try_number: i64,
    stdout: u64,
    stderr: u64,
}

impl Printed {
    /// Returns the position in the streams of the attempt with this epoch.
    fn of_attempt(self, epoch: i64) -> Self {
        if self.epoch == epoch { self } else { Self { epoch, ..Self::default() } }
    }
}

pub(crate) async fn run(global: &Global, arguments: LogsArguments) -> Result<u8, Failure> {
    let pids = read_ids(std::slice::from_ref(&arguments.pid))?;
    let &[pid] = pids.as_slice() else {
        return Err(Failure::usage("expected exactly one process id"));
    };
    let client = Client::open(global).await?;
    let mut printed = Printed::default();
    let mut open = None;
    loop {
        let filter = Filter::of(vec![pid]);
        let summary = client.store.list(&filter).await?.pop().ok_or_else(|| absent(pid))?;
        // Ask the worker first: if the process ends in between, the database has everything that is kept.
        let has_grown = match live(&client, &summary, &mut printed).await? {
            Some(has_grown) => has_grown,
            None if !summary.state.is_final() && summary.kind == JOB => {
                at_site(global, &client, &summary, &mut open, &mut printed).await?
            }
            None => {
                let is_same_try = printed.try_number == summary.try_number;
                stored(&client, pid, &mut printed, is_same_try).await?
            }
        };
        if summary.state.is_final() || !arguments.follow {
            break;
        }
        if !has_grown {
            tokio::time::sleep(LOOK).await;
        }
    }
    client.close().await;
    Ok(exit::OK)
}

/// Prints new output from the holder; `None` if no worker can be asked.
async fn live(client: &Client, summary: &Summary, printed: &mut Printed) -> Result<Option<bool>, Failure> {
    let Some(owner) = summary.owner else { return Ok(None) };
    let Some(queue) = client.store.control_queue_of(owner).await? else { return Ok(None) };
    let Ok(Some(communicator)) = client.broker().await else { return Ok(None) };
    // An attempt without output starts no streams: those of the previous attempt may still be printed.
    let from = printed.of_attempt(summary.epoch);
    let control = Control::Output { pid: summary.pid, stdout_offset: from.stdout, stderr_offset: from.stderr };
    let Ok(reply) = communicator.request(&queue, control, HOLDER_LIMIT).await else { return Ok(None) };
    let Some(chunk) = reply.output else { return Ok(None) };
    let begun = from.of_attempt(chunk.epoch);
    if (begun.stdout, begun.stderr) != (from.stdout, from.stderr) {
        // The process was claimed again, and these bytes are not the first of the new streams.
        *printed = begun;
        return Ok(Some(true));
    }
    write(&chunk.stdout, &chunk.stderr)?;
    *printed = Printed {
        stdout: begun.stdout + chunk.stdout.len() as u64,
        stderr: begun.stderr + chunk.stderr.len() as u64,
        ..begun
    };
    Ok(Some(!chunk.stdout.is_empty() || !chunk.stderr.is_empty()))
}

/// Prints new output of a job at a site over a session of this command: of the current try, then of the next one.
async fn at_site(
    global: &Global,
    client: &Client,
    summary: &Summary,
    open: &mut Option<(Session, String)>,
    printed: &mut Printed,
) -> Result<bool, Failure> {
    if open.is_none() {
        let details = client.store.show(summary.pid).await?.ok_or_else(|| absent(summary.pid))?;
        let on_site = details.spec.as_ref().and_then(|spec| spec.on_site.as_ref());
        let config = global.connection.resolve()?.config;
        let Some(site) = on_site.and_then(|on_site| config.sites.get(&on_site.at)) else {
            return stored(client, summary.pid, printed, false).await;
        };
        *open = Some((site::open(&config, site).await?, site::there(site, "p")));
    }
    let Some((session, folder)) = open else { return Ok(false) };
    if printed.try_number == 0 {
        printed.try_number = summary.try_number;
    }
    let dir = format!("{folder}/{}/{}/.baton", summary.pid, printed.try_number);
    let mut has_grown = false;
    for (name, offset) in [("stdout", &mut printed.stdout), ("stderr", &mut printed.stderr)] {
        let path = quote(&format!("{dir}/{name}"));
        let command = format!("[ -f {path} ] || exit 0; tail -c +{} {path} | head -c {PIECE_BYTES}", *offset + 1);
        let bytes = session.exec(&command, b"", HOLDER_LIMIT * 4).await?.ok()?;
        *offset += bytes.len() as u64;
        has_grown |= !bytes.is_empty();
        if name == "stdout" { write(&bytes, &[])? } else { write(&[], &bytes)? }
    }
    if has_grown {
        return Ok(true);
    }
    if printed.try_number < summary.try_number {
        *printed = Printed { try_number: summary.try_number, ..Printed::default() };
        return Ok(true);
    }
    tokio::time::sleep(SITE_LOOK).await;
    Ok(false)
}

/// Prints the rest of the output from the database, for the same attempt or for the same try at a site.
async fn stored(client: &Client, pid: Pid, printed: &mut Printed, is_same_try: bool) -> Result<bool, Failure> {
    let Some((epoch, outputs)) = client.store.output(pid).await? else { return Ok(false) };
    if epoch != printed.epoch && !is_same_try {
        *printed = Printed { epoch, ..Printed::default() };
    }
    let mut has_grown = false;
    for output in outputs {
        let offset = match output.stream {
            Stream::Stdout => &mut printed.stdout,
            Stream::Stderr => &mut printed.stderr,
        };
        let rest = beyond(&output, *offset);
        has_grown |= !rest.is_empty();
        *offset = output.total_bytes;
        match output.stream {
            Stream::Stdout => write(&rest, &[])?,
            Stream::Stderr => write(&[], &rest)?,
        }
    }
    Ok(has_grown)
}

/// Returns the kept bytes of a stream from an offset, with a line in place of omitted bytes.
fn beyond(output: &Output, offset: u64) -> Vec<u8> {
    let head_end = output.head.len() as u64;
    let tail_start = output.total_bytes - output.tail.len() as u64;
    let skip = |from: u64| usize::try_from(offset.saturating_sub(from)).unwrap_or(usize::MAX);
    let mut rest = output.head.get(skip(0)..).unwrap_or_default().to_vec();
    if offset < tail_start && tail_start > head_end {
        rest.extend_from_slice(format!("\n[… {} bytes omitted …]\n", tail_start - head_end.max(offset)).as_bytes());
    }
    rest.extend_from_slice(output.tail.get(skip(tail_start)..).unwrap_or_default());
    rest
}

fn write(stdout: &[u8], stderr: &[u8]) -> Result<(), Failure> {
    if !stdout.is_empty() {
        let mut stream = std::io::stdout();
        stream.write_all(stdout)?;
        stream.flush()?;
    }
    if !stderr.is_empty() {
        std::io::stderr().write_all(stderr)?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn output(head: &str, tail: &str, total_bytes: u64) -> Output {
        Output { stream: Stream::Stdout, head: head.into(), tail: tail.into(), total_bytes }
    }

    #[test]
    fn kept_output_is_printed_once_and_omitted_bytes_are_counted() {
        let whole = output("abc", "def", 6);
        assert_eq!(beyond(&whole, 0), b"abcdef");
        assert_eq!(beyond(&whole, 2), b"cdef");
        assert_eq!(beyond(&whole, 4), b"ef");
        assert_eq!(beyond(&whole, 6), b"");
        let cut = output("abc", "xyz", 106);
        let text = String::from_utf8(beyond(&cut, 0)).unwrap();
        assert!(text.starts_with("abc\n[… 100 bytes") && text.ends_with("\nxyz"), "{text}");
        assert_eq!(beyond(&cut, 104), b"yz");
    }
}
