//! How a job ended: what it left in its folder, and what its launcher says where it left no `done.json`.

use std::time::Duration;

use baton_common::duration;
use baton_common::spec::Spec;
use baton_common::store::site::Job as Row;
use baton_common::store::writer::{Output, Stream};

use super::at::At;
use super::trouble::{Trouble, not_yet};
use super::{CANCEL_PAUSE, Job, LOOKS_MAX, NO_FOLDER, SETTLE_PAUSE};
use crate::author::process::{Advance, Error};
use crate::site::launcher::{self, End, Phase};
use crate::site::script::{self, AGAIN, BEGUN, GIVEN_UP, RAN};
use crate::site::{Visit, staging};
use crate::transport::{self, quote};

/// How long to wait for `done.json` after the launcher ended a job, or lost it. After any other end the script should
/// have written the file, so the site's `settle` applies.
const END_PATIENCE: Duration = Duration::from_secs(15);

/// Jobs of a process that the site may lose before the process fails.
const LOST_MAX: u32 = 10;

/// Bytes that are kept of the beginning of a stream, and of its end.
const STREAM_PART_BYTES: usize = 32 * 1024;

/// The exit of [`left`] if only the second name of the script is there: the program removed the folder.
const EMPTIED: i32 = 43;

/// The files that a job left, other than those of its program.
pub(super) struct Left {
    /// Its `done.json`.
    pub(super) done: Option<Vec<u8>>,
    /// The kept parts of both streams.
    pub(super) outputs: Vec<Output>,
}

/// The traces of a job that say how far it came.
pub(super) struct Traces {
    /// The try was given up before its job started.
    is_given_up: bool,
    /// The launcher started the job a second time.
    pub(super) is_again: bool,
    /// The script came to the lines of `pre`.
    has_begun: bool,
    /// The program was started.
    has_run: bool,
}

impl Job {
    /// The advance after a job that is gone without `done.json`.
    pub(super) async fn without_mark(
        &mut self,
        at: &At<'_>,
        visit: &Visit,
        dir: &str,
        outputs: Vec<Output>,
    ) -> Result<Advance, Trouble> {
        let Some(row) = at.row().await? else { return Err(Error::failed("the row of its job is gone").into()) };
        let traces = at.look(visit, dir).await?;
        if traces.is_given_up {
            at.context.log(format!("{}: the try was given up before its job started; submitting again", at.site.name));
            at.context.begin_next_try();
            return Ok(Advance::Again);
        }
        let patience = match launcher::end(at.site.launcher, &row.look.status) {
            End::TimeLimit | End::OutOfMemory | End::Cancelled | End::Lost if !traces.is_again => END_PATIENCE,
            End::TimeLimit
            | End::OutOfMemory
            | End::Cancelled
            | End::Lost
            | End::Interrupted
            | End::Exited
            | End::Unknown => at.site.config.settle.max(END_PATIENCE),
        };
        if !at.has_passed(row.ended_at.unwrap_or(row.intent_at), patience).await? {
            return Ok(Advance::After(SETTLE_PAUSE));
        }
        self.ended_by_launcher(at, visit, dir, &row, traces, outputs).await
    }

    /// Asks the launcher about a job that was signalled and whose `done.json` was seen before the launcher's word: a launcher
    /// also signals a job that it requeues. Returns whether to look again, since the job still ends.
    pub(super) async fn is_unsettled(
        &mut self,
        at: &At<'_>,
        visit: &Visit,
        row: &mut Row,
        traces: &mut Traces,
    ) -> Result<bool, Trouble> {
        let listed = match at.find(visit, row).await? {
            Ok(listed) => listed,
            Err(complaint) => {
                // A failed answer proves nothing.
                at.context.log(format!("{}: {complaint}", at.site.name));
                return Err(not_yet(CANCEL_PAUSE * 3));
            }
        };
        match listed.map(|listed| (listed.phase, listed.status)) {
            Some((Phase::Waiting, _)) => traces.is_again = true,
            Some((Phase::Ended, status)) => row.look.status = status,
            Some((Phase::Running | Phase::Unknown, _)) if self.looks < LOOKS_MAX => {
                self.looks += 1;
                return Ok(true);
            }
            Some((Phase::Running | Phase::Unknown, _)) | None => {}
        }
        Ok(false)
    }

    /// The advance after a job whose script did not report its end, or that was ended by a signal from outside.
    pub(super) async fn ended_by_launcher(
        &mut self,
        at: &At<'_>,
        visit: &Visit,
        dir: &str,
        row: &Row,
        traces: Traces,
        outputs: Vec<Output>,
    ) -> Result<Advance, Trouble> {
        if traces.is_again {
            at.context.draft.borrow_mut().outputs = outputs;
            return self.begin_again(at, visit, dir, row, &traces, "requeued").await;
        }
        let ended_in_pre = with_last_line("env: `pre` ended the job before the program".to_owned(), &outputs);
        at.context.draft.borrow_mut().outputs = outputs;
        match launcher::end(at.site.launcher, &row.look.status) {
            End::TimeLimit => self.over_limit(at, visit, dir, &traces, walltime(at.spec), 124).await,
            End::OutOfMemory => {
                let reason = "oom: it exceeded its memory limit".to_owned();
                self.over_limit(at, visit, dir, &traces, reason, 137).await
            }
            End::Cancelled => Err(Error::Failed("scheduler: the job was cancelled at the site".into()).into()),
            End::Exited if traces.has_begun && !traces.has_run => Err(Error::Failed(ended_in_pre).into()),
            End::Exited => {
                let said = visit.read(&format!("{dir}/.baton/launcher.out")).await?.unwrap_or_default();
                let said = String::from_utf8_lossy(&said);
                let last = said.lines().last().unwrap_or("nothing");
                if traces.has_run {
                    let text = format!("scheduler: the job ended without done.json; its script last printed: {last}");
                    return Err(Error::Failed(text).into());
                }
                let why = format!("its script ran nothing; it last printed: {last}");
                self.begin_again(at, visit, dir, row, &traces, &why).await
            }
            End::Lost | End::Interrupted | End::Unknown => {
                self.begin_again(at, visit, dir, row, &traces, &row.look.status).await
            }
        }
    }

    /// The advance after a job that exceeded a limit: its results are collected nevertheless.
    async fn over_limit(
        &self,
        at: &At<'_>,
        visit: &Visit,
        dir: &str,
        traces: &Traces,
        reason: String,
        exit: i32,
    ) -> Result<Advance, Trouble> {
        let missing = match traces.has_run {
            true => staging::stage_out(&at.site, visit, at.context, at.on_site, dir, false).await?.reason(),
            false => None,
        };
        let reason = [Some(reason), missing].into_iter().flatten().collect::<Vec<_>>().join("; ");
        at.context.draft.borrow_mut().outcome.reason = Some(reason);
        Ok(Advance::Finished { exit })
    }

    /// Submits a job again that the site lost, at no charge, unless its program had started.
    async fn begin_again(
        &mut self,
        at: &At<'_>,
        visit: &Visit,
        dir: &str,
        row: &Row,
        traces: &Traces,
        why: &str,
    ) -> Result<Advance, Trouble> {
        // No job of this try may start any more, and one that still runs is ended.
        let cancel = row.external_id.as_ref().map(|id| at.site.launcher.cancel(id)).unwrap_or_default();
        let end = format!("{}{}{cancel}\ntrue", script::give_up(dir), script::prevent_start(dir));
        let stdout = visit.exec(&end).await?.ok()?;
        // Scripts of earlier versions leave another sign that the program has started.
        if traces.has_run || has_line(&stdout, RAN) {
            let text = format!("lost: the site lost the job after its program had started ({why})");
            return Err(Error::Failed(text).into());
        }
        self.lost += 1;
        if self.lost > LOST_MAX {
            return Err(Error::Failed(format!("lost: the site lost {LOST_MAX} of its jobs ({why})")).into());
        }
        at.context.log(format!("{}: the job was lost ({why}); submitting again", at.site.name));
        at.context.begin_next_try();
        Ok(Advance::Again)
    }
}

impl At<'_> {
    pub(super) async fn look(&self, visit: &Visit, dir: &str) -> Result<Traces, Trouble> {
        let stdout = visit.exec(&script::look_for_start(dir)).await?.ok()?;
        Ok(Traces {
            is_given_up: gives_up(&stdout),
            is_again: has_line(&stdout, AGAIN),
            has_begun: has_line(&stdout, BEGUN),
            has_run: has_line(&stdout, RAN),
        })
    }
}

/// Adds the last line that the job wrote to its standard error.
pub(super) fn with_last_line(text: String, outputs: &[Output]) -> String {
    let stderr = outputs.iter().find(|output| output.stream == Stream::Stderr);
    let written = stderr.map(|output| [&output.head[..], &output.tail[..]].concat()).unwrap_or_default();
    let written = String::from_utf8_lossy(&written);
    match written.lines().rfind(|line| !line.trim().is_empty()) {
        Some(line) => format!("{text}: {}", transport::shortened(&line.replace(char::is_control, " "))),
        None => text,
    }
}

/// Whether the output of a script says that the try is given up.
pub(super) fn gives_up(stdout: &[u8]) -> bool {
    has_line(stdout, GIVEN_UP)
}

fn has_line(stdout: &[u8], word: &str) -> bool {
    stdout.split(|byte| *byte == b'\n').any(|line| line == word.as_bytes())
}

pub(super) fn walltime(spec: &Spec) -> String {
    match spec.time {
        Some(limit) => format!("walltime: it exceeded its time limit of {}", duration::format(limit)),
        None => "walltime: it exceeded the site's time limit".to_owned(),
    }
}

/// Reads what a job left, by one command: a login node starts a shell for each.
pub(super) async fn left(visit: &Visit, dir: &str) -> Result<Left, Trouble> {
    let part = STREAM_PART_BYTES;
    let script = format!(
        "if [ ! -d {0} ]; then
           [ \"$(stat -c %h {second} 2>/dev/null)\" != 1 ] || exit {EMPTIED}
           echo 'its folder at the site is missing' >&2; exit {NO_FOLDER}
         fi
         for file in {0}/done.json {0}/stderr {0}/stdout; do
           [ -f \"$file\" ] || {{ echo -; continue; }}
           size=$(wc -c < \"$file\") || exit 1
           echo $size
           [ $size -gt {1} ] || {{ head -c $size \"$file\" || exit 1; continue; }}
           head -c {part} \"$file\" && tail -c {part} \"$file\" || exit 1
         done",
        quote(&format!("{dir}/.baton")),
        2 * part,
        second = quote(&staging::second_name(dir)),
    );
    let output = visit.exec(&script).await?;
    match output.exit {
        Some(NO_FOLDER) => return Err(staging::Error::Content(output.complaint()).into()),
        Some(EMPTIED) => {
            return Err(Trouble::Emptied(format!("the program removed {dir}/.baton, which holds its exit code")));
        }
        Some(_) | None => {}
    }
    let bytes = output.ok()?;
    let mut rest = &bytes[..];
    let done = next_left(&mut rest)?.map(|(content, _)| content);
    let mut outputs = Vec::new();
    for stream in [Stream::Stderr, Stream::Stdout] {
        if let Some((mut head, total_bytes)) = next_left(&mut rest)?
            && total_bytes > 0
        {
            let tail = head.split_off(head.len().min(part));
            outputs.push(Output { stream, head, tail, total_bytes });
        }
    }
    Ok(Left { done, outputs })
}

/// The printed part of the next file, and its whole length.
fn next_left(rest: &mut &[u8]) -> Result<Option<(Vec<u8>, u64)>, Trouble> {
    let changed = || staging::Error::Content("the files of the job change while they are read".to_owned());
    let end = rest.iter().position(|byte| *byte == b'\n').ok_or_else(changed)?;
    let (line, content) = (&rest[..end], &rest[end + 1..]);
    *rest = content;
    if line == b"-" {
        return Ok(None);
    }
    let total_bytes: u64 =
        std::str::from_utf8(line).ok().and_then(|line| line.trim().parse().ok()).ok_or_else(changed)?;
    let count = usize::try_from(total_bytes).unwrap_or(usize::MAX).min(2 * STREAM_PART_BYTES);
    let (content, rest_of_all) = content.split_at_checked(count).ok_or_else(changed)?;
    *rest = rest_of_all;
    Ok(Some((content.to_vec(), total_bytes)))
}
