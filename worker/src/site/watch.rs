//! The watch over the jobs of a site: one worker of the fleet has it, and asks once in an interval for all of them over one
//! shell that stays open.
//!
//! What a launcher's list says ends no process: it wakes it, and the process reads what its script has left. A job that is
//! not in a list has ended only if its script says so, or if it is missing again and again; a list that cannot be had, or
//! is none, says nothing about any job. Jobs that nobody wants any more are ended here as well.

use std::collections::HashMap;
use std::fmt::Write as _;
use std::time::{Duration, Instant};

use baton_common::border;
use baton_common::store::site::{Job, Look, Seen};
use tracing::{debug, info, warn};

use super::launcher::{Listed, Phase};
use super::pool::Lease;
use super::{COMMAND_LIMIT, Site, Visit, script};
use crate::incarnation::Shared;
use crate::transport::{self, Output, Shell, quote};

/// In at least so many lists in a row a job must be missing, and for the time of settling, before it is gone.
const ABSENT_MIN: i64 = 3;

/// What the row of such a job says.
pub(crate) const LOST: &str = "LOST";

/// Jobs that are ended in one look.
const REAPED_MAX: usize = 50;

/// For how long without any job the watch is kept.
const KEPT: Duration = Duration::from_secs(10);

/// What this worker has for the watch.
#[derive(Default)]
pub(crate) struct Watch {
    open: Option<Open>,
    next: Option<Instant>,
    last_needed: Option<Instant>,
    has_complained: bool,
}

struct Open {
    root: String,
    shell: Shell,
    // The channel that the shell has.
    lease: Lease,
}

impl Open {
    async fn run(&mut self, script: &str) -> Result<Output, transport::Error> {
        self.shell.run(script, COMMAND_LIMIT).await
    }
}

impl Watch {
    /// Looks at the jobs, if it is time to and this worker has the watch or can take it.
    pub(crate) async fn look(&mut self, shared: &Shared, site: &Site, has_jobs: bool) {
        let now = Instant::now();
        if has_jobs {
            self.last_needed = Some(now);
        } else if self.last_needed.is_none_or(|needed| needed.elapsed() > KEPT) {
            self.give_up(site).await;
            return;
        }
        if !has_jobs || self.next.is_some_and(|next| now < next) {
            return;
        }
        match site.store.take_permit(&site.watch(), site.me).await {
            Ok(true) => {}
            Ok(false) => {
                self.open = None;
                return;
            }
            Err(error) => {
                debug!(site = site.name, %error, "the watch is not ours while the database does not answer");
                return;
            }
        }
        if self.open.is_none() && !self.enter(site).await {
            // Somebody else may have a session.
            let _ = site.store.give_permit(&site.watch(), site.me).await;
            return;
        }
        if self.open.as_ref().is_some_and(|open| site.pool.is_fading(&open.lease)) {
            // Its session is to be closed; the next look is over a younger one.
            self.open = None;
            return;
        }
        let interval = i64::try_from(site.config.poll.as_micros()).unwrap_or(i64::MAX);
        match site.store.begin_poll(&site.name, interval).await {
            Ok(true) => {}
            Ok(false) | Err(_) => return,
        }
        self.next = Some(now + site.config.poll.mul_f64(0.9));
        let Some(open) = &mut self.open else { return };
        match poll(shared, site, open).await {
            Ok(()) => self.has_complained = false,
            Err(Failure::Transport(error)) => {
                self.open = None;
                site.failed(&error).await;
            }
            Err(Failure::Launcher(text)) => {
                if !self.has_complained {
                    warn!(
                        site = site.name,
                        error = text,
                        "the launcher does not answer; its jobs are left as they are"
                    );
                    self.has_complained = true;
                }
                let _ = site.store.note_launcher(&site.name, &text).await;
            }
            Err(Failure::Store(error)) => debug!(site = site.name, %error, "what was seen is not recorded"),
        }
    }

    /// Leaves the watch to others.
    pub(crate) async fn give_up(&mut self, site: &Site) {
        if self.open.take().is_some() {
            let _ = site.store.give_permit(&site.watch(), site.me).await;
        }
    }

    async fn enter(&mut self, site: &Site) -> bool {
        let Ok(Visit { session, root }) = site.open().await else { return false };
        match session.shell().await {
            Ok(shell) => {
                info!(site = site.name, "this worker has the watch over the jobs");
                self.open = Some(Open { root, shell, lease: session });
                true
            }
            Err(error) => {
                site.failed(&error).await;
                false
            }
        }
    }
}

enum Failure {
    Transport(transport::Error),
    Launcher(String),
    Store(baton_common::store::Error),
}

impl From<transport::Error> for Failure {
    fn from(error: transport::Error) -> Self {
        Failure::Transport(error)
    }
}

impl From<baton_common::store::Error> for Failure {
    fn from(error: baton_common::store::Error) -> Self {
        Failure::Store(error)
    }
}

async fn poll(shared: &Shared, site: &Site, open: &mut Open) -> Result<(), Failure> {
    let jobs = site.store.open_jobs(&site.name).await?;
    let dirs: Vec<(&Job, String)> =
        jobs.iter().map(|job| (job, format!("{}/p/{}/{}", open.root, job.pid, job.attempt))).collect();
    let output = open.run(&site.launcher.list(&dirs, None)).await?;
    let listed = site.launcher.listed(&output).map_err(Failure::Launcher)?;
    let positions = positions(site, open, &listed).await?;
    let mut by_token: HashMap<&str, &Listed> = HashMap::new();
    for one in &listed {
        let entry = by_token.entry(&one.token).or_insert(one);
        // One that is still there counts more than one that has ended.
        if entry.phase == Phase::Ended {
            *entry = one;
        }
    }
    let missing: Vec<&(&Job, String)> = dirs
        .iter()
        .filter(|(job, _)| job.external_id.is_some() && !by_token.contains_key(job.token().as_str()))
        .collect();
    let marks = marks(open, &missing).await?;
    let settling = site.config.settle.as_millis() / site.config.poll.as_millis().max(1);
    let absent_max = i64::try_from(settling).unwrap_or(i64::MAX).max(ABSENT_MIN);
    let mut seen = Vec::new();
    let mut unwanted = Vec::new();
    for (job, dir) in &dirs {
        let token = job.token();
        let found = by_token.get(token.as_str()).copied();
        let before =
            Seen { pid: job.pid, attempt: job.attempt, external_id: None, look: job.look.clone(), is_ended: false };
        let now = match found {
            Some(found) => Seen {
                external_id: job.external_id.is_none().then(|| found.external_id.clone()),
                look: Look {
                    status: found.status.clone(),
                    reason: found.reason.clone(),
                    position: found
                        .priority
                        .filter(|_| found.phase == Phase::Waiting)
                        .map(|priority| positions.of(priority)),
                    starts_at: found.starts_at,
                    absent: 0,
                },
                is_ended: found.phase == Phase::Ended,
                ..before.clone()
            },
            None if job.external_id.is_none() => before.clone(),
            None if marks.get(&token).is_some_and(|mark| mark == "done") => Seen { is_ended: true, ..before.clone() },
            None => {
                let absent = job.look.absent + 1;
                let is_ended = absent >= absent_max;
                let status = if is_ended { LOST.to_owned() } else { job.look.status.clone() };
                Seen { look: Look { absent, status, ..job.look.clone() }, is_ended, ..before.clone() }
            }
        };
        if job.is_doomed && !now.is_ended {
            unwanted.push((*job, dir, found));
        }
        if now != before {
            seen.push(now);
        }
    }
    for page in seen.chunks(1000) {
        let woken = site.store.record_seen(page).await?;
        if page.iter().any(|seen| seen.is_ended) {
            border!("job-seen");
        }
        shared.tell_all(woken).await;
    }
    for (job, dir, found) in unwanted.into_iter().take(REAPED_MAX) {
        reap(site, open, job, dir, found).await?;
    }
    Ok(())
}

/// What the scripts of jobs have left that are in no list.
async fn marks(open: &mut Open, jobs: &[&(&Job, String)]) -> Result<HashMap<String, String>, Failure> {
    if jobs.is_empty() {
        return Ok(HashMap::new());
    }
    let mut script =
        String::from("mark() { if [ -f \"$2/.baton/done.json\" ]; then echo \"$1 done\"; else echo \"$1 -\"; fi; }\n");
    for (job, dir) in jobs {
        let _ = writeln!(script, "mark {} {}", job.token(), quote(dir));
    }
    let stdout = open.run(&script).await?.ok()?;
    let text = String::from_utf8_lossy(&stdout);
    let pairs = text.lines().filter_map(|line| line.split_once(' '));
    Ok(pairs.map(|(token, mark)| (token.to_owned(), mark.to_owned())).collect())
}

/// The priorities of all that wait at a site, the largest first.
struct Positions(Vec<i64>);

impl Positions {
    /// How many are not after this one: 1 for the first.
    fn of(&self, priority: i64) -> i64 {
        i64::try_from(self.0.partition_point(|other| *other > priority)).unwrap_or(i64::MAX - 1) + 1
    }
}

async fn positions(site: &Site, open: &mut Open, listed: &[Listed]) -> Result<Positions, Failure> {
    let is_any_waiting = listed.iter().any(|one| one.phase == Phase::Waiting);
    let Some(script) = site.launcher.waiting().filter(|_| is_any_waiting) else { return Ok(Positions(vec![])) };
    let output = open.run(script).await?;
    let text = String::from_utf8_lossy(&output.stdout);
    let mut priorities: Vec<i64> = text.lines().filter_map(|line| line.trim().parse().ok()).collect();
    priorities.sort_unstable_by_key(|priority| std::cmp::Reverse(*priority));
    Ok(Positions(priorities))
}

/// Ends a job that nobody wants any more, or makes sure that there can be none.
async fn reap(site: &Site, open: &mut Open, job: &Job, dir: &str, found: Option<&Listed>) -> Result<(), Failure> {
    let id = found.map(|found| found.external_id.clone()).or_else(|| job.external_id.clone());
    // Whatever is still on its way finds both taken, and runs nothing.
    let folder = quote(&format!("{dir}/{}", script::FOLDER));
    let mut script = format!("mkdir -p {folder} && mkdir {folder}/submit 2>/dev/null\n{}", script::give_up(dir));
    if let Some(id) = &id {
        info!(pid = %job.pid, site = site.name, job = id, "ending a job that nobody wants any more");
        let _ = writeln!(script, "{}", site.launcher.cancel(id));
    }
    open.run(&script).await?;
    if id.is_none() {
        let settled = site.config.submit_timeout + site.config.settle;
        let age = site.store.now().await? - job.intent_at;
        if age > i64::try_from(settled.as_micros()).unwrap_or(i64::MAX) {
            site.store.record_seen(&[Seen::ended(job, "")]).await?;
        }
    }
    Ok(())
}
